-- Give back what a worker holds; for each id, how often its handler took a worker down (protocol §5).

local worker, ids, is_crashed = REQUEST[1], REQUEST[2], REQUEST[3]

local function release(id)
  local state = get_states().read_state(id)
  if not state or state.token == 0 then
    -- Never claimed, under once="none", or done: nothing else ends what is known of it.
    if not is_crashed then return state and state.crashes or 0 end
    if not state then
      state = new_state(id, 'waiting', 0)
      state['until'] = NOW
    end
    if state.status == 'waiting' then state.expires = NOW + WEEK end
    state.crashes = state.crashes + 1
    save(state)
  elseif state.status == 'running' and state.worker == worker then
    -- Only a handler that had started counts.
    if is_crashed and state.started then state.crashes = state.crashes + 1 end
    get_states().give_up(state)
    state.status, state['until'] = 'waiting', NOW
    save(state)
  end
  return state.crashes
end

local counts = {}
for number, id in ipairs(ids) do counts[number] = release(id) end
return counts
