-- Give back what a worker holds; for each id, how often its handler took a worker down (protocol §5).

local request = named({'worker', 'ids', 'crashed'}, REQUEST)

local function release(id)
  local key, state = of_id('s', id), read_state(id)
  local crashes = state and state.crashes or 0
  if not state or state.token == 0 then
    -- Never claimed, under once="none", or done: nothing else ends what is known of it.
    if not request.crashed then return crashes end
    if not state then redis.call('HSET', key, 'copy', 0, 'status', 'waiting', 'until', digits(NOW)) end
    if not state or state.status == 'waiting' then expire_state(id) end
    return redis.call('HINCRBY', key, 'crashes', 1)
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
