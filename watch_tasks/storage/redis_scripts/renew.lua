-- Extend the leases that a worker holds; 1 for each id it holds, 0 for the others, which are left alone (protocol §4).

local request = named({'worker', 'ids', 'lease'}, REQUEST)
local held = {}
for number, id in ipairs(request.ids) do
  local state = read_state(id)
  held[number] = 0
  if state and state.worker == request.worker and is_held(state) then
    redis.call('HSET', of_id('s', id), 'until', digits(NOW + micros(request.lease)))
    held[number] = 1
  end
end
return held
