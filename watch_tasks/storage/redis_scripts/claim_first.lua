-- Messages that are asked for the first time are most of all, and nothing is known of them: all are granted at once,
-- before anything else is even defined.
--
-- A run is of claims that have much in common. It is plain where each may be granted so: under once="message", no id and
-- no index twice in the request. A column with one value for all is that value.

local runs, answers, is_rest = {}, {}, false

local function read_run(values)
  return {
    is_plain = values[1], topic = values[2], once = values[3], worker = values[4], lease = values[5],
    retention = values[6], started = values[7], ids = values[8], indexes = values[9], copies = values[10],
    sent = values[11], nonces = values[12], sizes = values[13], digests = values[14], notes = take(),
  }
end

-- Return which of a run have no state, no mark, no story and no record under their index; nil: all.
local function find_fresh(run)
  local ids, indexes, states, marks, keys = run.ids, run.indexes, PREFIX .. 's:', PREFIX .. 'm:', {}
  local stories, count = of_topic('t', run.topic) .. ':', #run.ids
  for number, id in ipairs(ids) do
    keys[number], keys[count + number], keys[2 * count + number] = states .. id, marks .. id, stories .. indexes[number]
  end
  run.keys = keys
  local is_known, fresh, are_all = redis.call('EXISTS', unpack(keys)) > 0, {}, true
  for number, record in ipairs(redis.call('HMGET', of_topic('r', run.topic), unpack(indexes))) do
    fresh[number] = not record and (not is_known or 0 ==
      redis.call('EXISTS', keys[number], keys[count + number], keys[2 * count + number]))
    are_all = are_all and fresh[number]
  end
  return not are_all and fresh or nil
end

-- Grant those of a run from one number to another.
local function grant_fresh(run, first, last)
  local ids, indexes, copies, sent, nonces, sizes, keys = run.ids, run.indexes, run.copies, run.sent, run.nonces, run.sizes, run.keys
  local copy, nonce, note = copies, nonces, run.notes
  local copied, noted, named = type(copies) == 'table', type(sizes) == 'table', type(nonces) == 'table'
  local lead = TAG .. struct.pack('>d', NOW + run.lease)
  local holder = struct.pack('>BI2c0', run.started and 1 or 0, #run.worker, run.worker)
  local ending, stories, pairs = head_end(run.topic, run.retention), 2 * #ids, {}
  local head_place = 14 + #holder
  local events_place = head_place + 14 + #ending
  for number = first, last do
    local index, token, place = indexes[number], next_token(), 4 * (number - first)
    if copied then copy = copies[number] end
    if named then nonce = nonces[number] end
    if noted then note = string.sub(run.notes, run.ends[number - 1] + 1, run.ends[number]) end
    pairs[place + 1] = keys[number]
    pairs[place + 2] = struct.pack('>c0I2I2c0c0dI4I2c0c0I4ddc0', lead, head_place + #nonce, events_place + #nonce + #index,
      holder, nonce, token, copy, #index, index, ending, copy, sent[number], NOW, note)
    pairs[place + 3], pairs[place + 4] = keys[stories + number], ids[number]
    answers[#answers + 1] = token
  end
  redis.call('MSET', unpack(pairs))
end

for number, values in ipairs(REQUEST) do
  local run = read_run(values)
  runs[number] = run
  if type(run.sizes) == 'table' then
    local total = 0
    run.ends = {[0] = 0}
    for place, size in ipairs(run.sizes) do
      total = total + size
      run.ends[place] = total
    end
  end
  if run.is_plain then run.fresh = find_fresh(run) end
  is_rest = is_rest or not run.is_plain or run.fresh
end
if not is_rest then
  for _, run in ipairs(runs) do grant_fresh(run, 1, #run.ids) end
  return finish({NOW, answers[1]})
end
