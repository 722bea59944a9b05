-- Give back what a worker holds; for each id, how often its handler took a worker down (protocol §5).

local request = named({'worker', 'ids', 'crashed'}, REQUEST)

local function release(id)
  local key, state = of_id('s', id), read_state(id)
  if not state then
    if not request.crashed then return 0 end
    -- Never claimed, under the rule "none": only its crashes are remembered.
    redis.call('HSET', key, 'copy', 0, 'status', 'waiting', 'until', digits(NOW), 'crashes', 1)
    redis.call('PEXPIRE', key, WEEK * 1000)
    return 1
  end
  if state.status == 'running' and state.worker == request.worker then
    -- Only a handler that had started counts.
    if request.crashed and state.started then state.crashes = state.crashes + 1 end
    give_up(state)
    redis.call('HSET', key, 'status', 'waiting', 'until', digits(NOW), 'crashes', state.crashes)
  end
  return state.crashes
end

local counts = {}
for number, id in ipairs(request.ids) do counts[number] = release(id) end
return counts
