-- Throw one dead letter away. Its id stays dead for a week, so that redeliveries of it are still duplicates.

local request = named({'id', 'topic', 'index'}, REQUEST)
if not drop_letter(request.id) then return 0 end
local state = read_state(request.id)
if state and (state.status == 'dead' or state.status == 'replaying') then expire_state(request.id) end
if request.index then
  tell(request.topic, request.index, WEEK, {event(NOW, 'removed', take(), expiry(WEEK, NOW))})
end
return 1
