-- Extend the leases that a worker holds; 1 for each id it holds, 0 for the others, which are left alone (protocol §4).

local worker, ids, lease = REQUEST[1], REQUEST[2], REQUEST[3]
local held = {}
for number, id in ipairs(ids) do
  local state = get_states().read_state(id)
  held[number] = 0
  if state and state.worker == worker and is_held(state) then
    state['until'] = NOW + lease
    save(state)
    held[number] = 1
  end
end
return held
