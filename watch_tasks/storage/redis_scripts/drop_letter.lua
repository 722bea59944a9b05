-- Throw one dead letter away. Its id stays dead for a week, so that redeliveries of it are still duplicates.

local id, topic, index = REQUEST[1], REQUEST[2], REQUEST[3]
if not get_states().drop_letter(id) then return 0 end
local state = get_states().read_state(id)
if state then
  state.lettered = false
  if state.status == 'dead' or state.status == 'replaying' then state.expires = NOW + WEEK end
  save(state)
  if not get_states().owns(state, state.topic, state.index) then disown(state.topic, state.index) end
end
if index then
  local is_owned = redis.call('HEXISTS', of_topic('r', topic), index) == 1 or get_states().owns(state, topic, index)
  tell(topic, index, NOW + WEEK, {{NOW, 'removed', take()}}, is_owned)
end
return 1
