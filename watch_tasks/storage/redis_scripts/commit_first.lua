-- Most messages are handled at their first try, under an index that has no record: all of them are settled at once, before
-- anything else is even defined. Their records take over the events of their states. A state in the short form says all
-- that: its index had neither record nor story when it was granted, and who writes either unfolds it.
--
-- A run is of handled messages of one topic and retention, no id and no index twice in the request. Of each comes what a
-- folded record has from its id to its blob (`records.lua`).

local runs, is_rest = {}, #REQUEST[2] > 0

local function read_run(values)
  local run = {
    topic = values[1], retention = values[2], ids = values[3], indexes = values[4], tokens = values[5], copies = values[6],
    sorted = values[7], ends = {[0] = 0}, settled = {}, chunks = take(),
  }
  local total = 0
  for number, size in ipairs(values[8]) do
    total = total + size
    run.ends[number] = total
  end
  return run
end

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
  local topic, retention, ids, indexes, tokens, copies = run.topic, run.retention, run.ids, run.indexes, run.tokens, run.copies
  local keys, fields, gone, added, prefix, is_first = {}, {}, {}, {}, PREFIX .. 's:', false
  for number, id in ipairs(ids) do keys[number] = prefix .. id end
  local states = redis.call('MGET', unpack(keys))
  for _, state in ipairs(states) do is_first = is_first or state and string.sub(state, 1, 1) == TAG end
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
  local ending, lead, stories = head_end(topic, retention), struct.pack('>Bd', flags, NOW), of_topic('t', topic) .. ':'
  local copy, copied = copies, type(copies) == 'table'
  for place = 1, #ids do
    local number = run.sorted and run.sorted[place] or place
    local state, index, since = states[number], indexes[number], NOW - tokens[number]
    if state and string.byte(state) == 1 and since >= 0 and since < 4294967296 then
      if copied then copy = copies[number] end
      local head, events = struct.unpack('>I2I2', state, 10)
      local expected = struct.pack('>dI4I2c0c0', tokens[number], copy, #index, index, ending)
      if #expected == events - head and string.find(state, expected, head, true) == head then
        local count = #added
        added[count + 1], fields[2 * count + 1] = index, index
        fields[2 * count + 2] = struct.pack('>c0I4c0c0c0', lead, since, span,
          string.sub(run.chunks, run.ends[number - 1] + 1, run.ends[number]), string.sub(state, events))
        gone[#gone + 1], gone[#gone + 2] = keys[number], stories .. index
        -- Who took the index over would have unfolded it.
        if string.byte(state, 14) >= EXCLUSIVE then gone[#gone + 1] = of_topic('h', topic) .. ':' .. index end
        run.settled[number] = true
      end
    end
  end
  if #added == 0 then return end
  redis.call('HSET', of_topic('r', topic), unpack(fields))
  append(fences, leaves, tail, added)
  redis.call('DEL', unpack(gone))
  count(topic, 'handled', #added)
  if retention then run.over = time_of(redis.call('ZRANGE', fences, 0, 0)[1]) + retention <= NOW end
  return #added == #ids
end

for number, values in ipairs(REQUEST[1]) do
  local run = read_run(values)
  runs[number] = run
  is_rest = not settle_first(run) or run.over or is_rest
end
if not is_rest then return finish(1) end
