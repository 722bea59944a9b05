-- Messages that are asked for the first time are most of all, and nothing is known of them: all are granted at once,
-- before anything else is even defined.
--
-- A run is of claims that have much in common. It is plain where each may be granted so: no id and no index is twice in
-- the request. A column with one value for all is that value.
--
-- Each string that is made here costs a look into the table of all strings, memory, and work for the collector: about as
-- much as all else that is done for a message. So there are as few as may be.

-- Answers, once not all are granted; the run at which more care begins.
local answers, runs, rest = {}, {}, nil

-- Grant those of a run from one number to another; returns whether there was nothing in the way.
local function grant_fresh(run, first, last, token, command)
  local ids, indexes, copies, sent, nonces, notes = run.ids, run.indexes, run.copies, run.sent, run.nonces, run.notes
  local copied, named, noted = type(copies) == 'table', type(nonces) == 'table', type(notes) == 'table'
  local pack, pairs, place = struct.pack, {}, 0
  local is_exclusive = run.once == 'index'
  local flags = (run.started and STARTED or 0) + (is_exclusive and EXCLUSIVE or 0)
  local lead, holder = TAG .. pack('>d', NOW + run.lease), pack('>BI2', flags, #run.worker) .. run.worker
  local ending, states, stories = head_end(run.topic, run.retention), PREFIX .. 's:', of_topic('t', run.topic) .. ':'
  local holders = is_exclusive and of_topic('h', run.topic) .. ':'
  local head_place, copy, nonce, note = 14 + #holder, copies, nonces, notes
  -- What states have in common: before the token, and from there to the index, by its length; and behind that.
  local fronts, middles, behind = {}, {}, not copied and ending .. pack('>I4', copies)
  for number = first, last do
    local index, id = indexes[number], ids[number]
    local size = #index
    if copied then
      copy = copies[number]
      behind = ending .. pack('>I4', copy)
    end
    if named then nonce = nonces[number] end
    if noted then note = notes[number] end
    if copied or named or not fronts[size] then
      local head = head_place + #nonce
      fronts[size] = lead .. pack('>I2I2', head, head + 14 + size + #ending) .. holder .. nonce
      middles[size] = pack('>I4I2', copy, size)
    end
    pairs[place + 1] = states .. id
    pairs[place + 2] = pack('>c0dc0c0c0ddc0', fronts[size], token, middles[size], index, behind, sent[number], NOW, note)
    pairs[place + 3], pairs[place + 4] = stories .. index, id
    token, place = token + 1, place + 4
    if holders then
      pairs[place + 1], pairs[place + 2], place = holders .. index, id, place + 2
    end
  end
  return redis.call(command, unpack(pairs)) ~= 0
end

-- Grant all of a run, if none has a mark, a state, a story or a record under its index, and no index is held.
local function grant_all(run)
  local ids, indexes = run.ids, run.indexes
  local count, records, marks, prefix = #ids, redis.call('HMGET', of_topic('r', run.topic), unpack(indexes)), {}, PREFIX .. 'm:'
  run.records = records
  for number = 1, count do
    if records[number] then return false end
    marks[number] = prefix .. ids[number]
  end
  if redis.call('EXISTS', unpack(marks)) > 0 then return false end
  -- As `next_token` does it, for many.
  local token, key = NOW, PREFIX .. 'token'
  local last = tonumber(redis.call('SET', key, digits(NOW + count - 1), 'GET') or 0)
  if last >= NOW then
    token = last + 1
    redis.call('SET', key, digits(last + count))
  end
  run.first = token
  return grant_fresh(run, 1, count, token, 'MSETNX')
end

for number, values in ipairs(REQUEST) do
  local run = {
    is_plain = values[1], topic = values[2], once = values[3], worker = values[4], lease = values[5],
    retention = values[6], started = values[7], ids = values[8], indexes = values[9], copies = values[10],
    sent = values[11], nonces = values[12], notes = values[13], digests = values[14],
  }
  runs[number] = run
  if not rest and not (run.is_plain and grant_all(run)) then rest = number end
end
if not rest then return {NOW, runs[1].first} end
for number = 1, rest - 1 do
  for place = 0, #runs[number].ids - 1 do answers[#answers + 1] = runs[number].first + place end
end
