-- May these dead letters be published again? {why, copy} for each, in order (protocol §6).

local function replay_one(id, patience, force, note)
  local state, head = read_state(id), redis.call('GETRANGE', of_id('d', id), 0, 7)
  if not state or head == '' then return {'gone', 0} end
  if state.status ~= 'dead' and state.status ~= 'replaying' then return {'gone', 0} end
  if state.status == 'replaying' and NOW < state['until'] then return {'taken', 0} end
  local record = state.index and read_record(state.topic, state.index)
  local is_newer = record and (record.at > struct.unpack('>d', head) or state.first > 0 and record.first > state.first)
  if is_newer and not force then return {'newer', 0} end
  local copy = state.status == 'dead' and state.copy + 1 or state.copy
  redis.call('HSET', of_id('s', id), 'copy', copy, 'status', 'replaying', 'until', digits(NOW + patience))
  if state.index then tell(state.topic, state.index, WEEK, {event(NOW, 'replayed', note, expiry(WEEK, NOW))}) end
  return {'accepted', copy}
end

local answers = {}
for number, values in ipairs(REQUEST) do
  answers[number] = replay_one(values[1], micros(values[2]), values[3], take())
end
return finish(answers)
