-- May these dead letters be published again? {why, copy} for each, in order (protocol §6).

local function replay_one(id, patience, force, note)
  local state, head = get_states().read_state(id), redis.call('GETRANGE', PREFIX .. 'd:' .. id, 0, 7)
  if not state or head == '' then return {'gone', 0} end
  if state.status ~= 'dead' and state.status ~= 'replaying' then return {'gone', 0} end
  if state.status == 'replaying' and NOW < state['until'] then return {'taken', 0} end
  local record = state.index and read_record(state.topic, state.index)
  local is_newer = record and (record.at > struct.unpack('>d', head) or state.first > 0 and record.first > state.first)
  if is_newer and not force then return {'newer', 0} end
  if state.status == 'dead' then state.copy, state.status = state.copy + 1, 'replaying' end
  state['until'] = NOW + patience
  save(state)
  if state.index then tell(state.topic, state.index, NOW + WEEK, {{NOW, 'replayed', note}}, true) end
  return {'accepted', state.copy}
end

local answers = {}
for number, values in ipairs(REQUEST) do
  answers[number] = replay_one(values[1], values[2], values[3], take())
end
return finish(answers)
