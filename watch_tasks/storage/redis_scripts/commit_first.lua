-- Most messages are handled at their first try, under an index that has no record: all of them are settled at once, before
-- anything else is even defined. Their records take over the events of their states. A state in the short form says all
-- that: its index had neither record nor story when it was granted, and who writes either unfolds it.
--
-- A run is of handled messages of one topic and retention, in the order of their indexes, no id and no index twice in the
-- request. Of each comes what a folded record has from its id to its blob (`records.lua`). As for claims, few strings are
-- made: a state is compared where it is, without cutting it. A record is joined with `..`, which copies whole strings;
-- `struct.pack` goes byte by byte.

local runs, is_rest = {}, #REQUEST[2] > 0

-- Add places of now behind all others of an order.
local function append(fences, leaves, tail, indexes)
  local entries, first, since = {}, 1, NOW - time_of(tail)
  while true do
    if since < SPAN then
      local at = struct.pack('>I4', since)
      for number = first, #indexes do entries[number - first + 1] = at .. indexes[number] end
      -- Asked for its length only by writing: most calls find room.
      local over = math.min(redis.call('RPUSH', leaves .. tail, unpack(entries)) - LEAF, #entries)
      if over <= 0 then return end
      redis.call('LTRIM', leaves .. tail, 0, -over - 1)
      first = #indexes + 1 - over
    end
    tail, since, entries = struct.pack('>I7', NOW + SHIFT) .. indexes[first], 0, {}
    redis.call('ZADD', fences, 0, tail)
  end
end

-- Settle those of a run that it can.
local function settle_first(run)
  local topic, retention, keys, indexes, tokens = run.topic, run.retention, run.keys, run.indexes, run.tokens
  local copies, chunks, settled, size, is_first = run.copies, run.chunks, run.settled, #run.keys, false
  local pack, unpack_from, find, byte = struct.pack, struct.unpack, string.find, string.byte
  local fields, gone, added = {}, {}, {}
  local states = redis.call('MGET', unpack(keys))
  for number = 1, size do is_first = is_first or states[number] and byte(states[number]) == 1 end
  if not is_first then return end
  local order = ':' .. (retention and digits(retention) or 'never')
  local fences, leaves = of_topic('i', topic) .. order, of_topic('z', topic) .. order .. ':'
  local tail = redis.call('ZRANGE', fences, -1, -1)[1]
  -- Where the order is not known to be there, or has something later, it needs more care.
  if not tail or time_of(tail) + struct.unpack('>I4', redis.call('LINDEX', leaves .. tail, -1)) >= NOW then return end
  local flags, span = FOLDED + NEAR + ENDLESS, ''
  if retention and retention % 1000000 == 0 then
    flags, span = FOLDED + NEAR + SECONDS, struct.pack('>I4', retention / 1000000)
  elseif retention then
    flags, span = FOLDED + NEAR, struct.pack('>d', retention)
  end
  local ending, lead, stories = head_end(topic, retention), pack('>Bd', flags, NOW), of_topic('t', topic) .. ':'
  local copy, copied, count_added, count_gone = copies, type(copies) == 'table', 0, 0
  for number = 1, size do
    local state, index, token = states[number], indexes[number], tokens[number]
    local since = NOW - token
    if state and byte(state) == 1 and since >= 0 and since < 4294967296 then
      if copied then copy = copies[number] end
      local head, events = unpack_from('>I2I2', state, 10)
      local its_token, its_copy, length = unpack_from('>dI4I2', state, head)
      local its_index, its_ending = head + 14, events - #ending
      if its_token == token and its_copy == copy and length == #index and its_index + length == its_ending
        and find(state, index, its_index, true) == its_index and find(state, ending, its_ending, true) == its_ending then
        count_added = count_added + 1
        added[count_added], fields[2 * count_added - 1] = index, index
        fields[2 * count_added] = lead .. pack('>I4', since) .. span .. chunks[number] .. string.sub(state, events)
        gone[count_gone + 1], gone[count_gone + 2], count_gone = keys[number], stories .. index, count_gone + 2
        -- Who took the index over would have unfolded it.
        if byte(state, 14) >= EXCLUSIVE then
          count_gone = count_gone + 1
          gone[count_gone] = of_topic('h', topic) .. ':' .. index
        end
        settled[number] = true
      end
    end
  end
  if count_added == 0 then return end
  redis.call('HSET', of_topic('r', topic), unpack(fields))
  append(fences, leaves, tail, added)
  redis.call('DEL', unpack(gone))
  count(topic, 'handled', count_added)
  if retention then run.over = time_of(redis.call('ZRANGE', fences, 0, 0)[1]) + retention <= NOW end
  return count_added == size
end

for number, values in ipairs(REQUEST[1]) do
  local run = {
    topic = values[1], retention = values[2], keys = values[3], indexes = values[4], tokens = values[5], copies = values[6],
    chunks = values[7], settled = {},
  }
  runs[number] = run
  is_rest = not settle_first(run) or run.over or is_rest
end
if not is_rest then return finish(1) end
