-- Messages that are asked for the first time are most of all, and nothing is known of them: all are granted at once,
-- before anything else is even defined.
--
-- A run is of claims that have much in common. It is plain where each may be granted so: no id and no index is twice in
-- the request. A column with one value for all is that value.

-- Tokens of those granted, or answers; the run at which more care begins.
local answers, runs, rest = {}, {}, nil

-- Grant those of a run from one number to another; returns whether there was nothing in the way.
local function grant_fresh(run, first, last, token, command)
  local ids, indexes, copies, sent, nonces, pairs = run.ids, run.indexes, run.copies, run.sent, run.nonces, {}
  local copy, nonce, note, copied, named = copies, nonces, run.notes, type(copies) == 'table', type(nonces) == 'table'
  local lead = TAG .. struct.pack('>d', NOW + run.lease)
  local is_exclusive = run.once == 'index'
  local flags = (run.started and STARTED or 0) + (is_exclusive and EXCLUSIVE or 0)
  local holder = struct.pack('>BI2c0', flags, #run.worker, run.worker)
  local ending, states, stories = head_end(run.topic, run.retention), PREFIX .. 's:', of_topic('t', run.topic) .. ':'
  local holders = is_exclusive and of_topic('h', run.topic) .. ':'
  local head_place, place = 14 + #holder, 0
  local events_place = head_place + 14 + #ending
  for number = first, last do
    local index, id = indexes[number], ids[number]
    if copied then copy = copies[number] end
    if named then nonce = nonces[number] end
    if run.ends then note = string.sub(run.notes, run.ends[number - 1] + 1, run.ends[number]) end
    pairs[place + 1] = states .. id
    pairs[place + 2] = struct.pack('>c0I2I2c0c0dI4I2c0c0I4ddc0', lead, head_place + #nonce, events_place + #nonce + #index,
      holder, nonce, token, copy, #index, index, ending, copy, sent[number], NOW, note)
    pairs[place + 3], pairs[place + 4] = stories .. index, id
    answers[#answers + 1], token, place = token, token + 1, place + 4
    if holders then
      pairs[place + 1], pairs[place + 2], place = holders .. index, id, place + 2
    end
  end
  return redis.call(command, unpack(pairs)) ~= 0
end

-- Grant all of a run, if none has a mark, a state, a story or a record under its index, and no index is held.
local function grant_all(run)
  run.records = redis.call('HMGET', of_topic('r', run.topic), unpack(run.indexes))
  for _, record in ipairs(run.records) do
    if record then return false end
  end
  local marks, prefix, count, before = {}, PREFIX .. 'm:', #run.ids, #answers
  for number, id in ipairs(run.ids) do marks[number] = prefix .. id end
  if redis.call('EXISTS', unpack(marks)) > 0 then return false end
  -- As `next_token` does it, for many.
  local token, key = NOW, PREFIX .. 'token'
  local last = tonumber(redis.call('SET', key, digits(NOW + count - 1), 'GET') or 0)
  if last >= NOW then
    token = last + 1
    redis.call('SET', key, digits(last + count))
  end
  if grant_fresh(run, 1, count, token, 'MSETNX') then return true end
  for number = before + 1, #answers do answers[number] = nil end
  return false
end

for number, values in ipairs(REQUEST) do
  local run = {
    is_plain = values[1], topic = values[2], once = values[3], worker = values[4], lease = values[5],
    retention = values[6], started = values[7], ids = values[8], indexes = values[9], copies = values[10],
    sent = values[11], nonces = values[12], digests = values[14], notes = take(),
  }
  if values[13] then
    run.ends = {[0] = 0}
    for place, size in ipairs(values[13]) do run.ends[place] = run.ends[place - 1] + size end
  end
  runs[number] = run
  if not rest and not (run.is_plain and grant_all(run)) then rest = number end
end
if not rest then return {NOW, answers[1]} end
