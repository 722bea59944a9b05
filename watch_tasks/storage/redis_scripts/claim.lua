-- May these copies be handled now? One answer for each, in order (protocol §2, §3).
-- Answers: {'granted', token, copy, progress, crashes, now}, or {why, µs until asking again}.

local NAMES = {'topic', 'index', 'id', 'copy', 'once', 'worker', 'lease', 'digest', 'retention', 'sent_at', 'started',
  'nonce'}

local function refuse(claim, why, wait)
  if why == 'duplicate' then count(claim.topic, 'duplicates', 1) end
  if why ~= 'conflict' then
    local kind = why == 'busy' and 'busy' or 'suppressed'
    tell(claim.topic, claim.index, claim.retention, {event(NOW, kind, claim.note, claim.expires)})
  end
  return {why, wait or 0}
end

-- This very claim was granted, and its answer lost: refused now, it would count as a crash later.
local function is_asked_again(claim, state)
  return claim.nonce ~= '' and claim.nonce == state.nonce and claim.worker == state.worker and is_held(state)
end

-- Compare the copy with what is known; nil: it may be claimed.
local function check_copy(claim, state)
  local older, same = claim.copy < state.copy, claim.copy == state.copy
  local is_alive = state.status == 'running' or state.status == 'waiting'
  -- A higher copy was delivered and claimed: this one is stale, whatever became of that lease.
  if is_alive and claim.copy < state.carried then return {'stale', 0} end
  if state.status == 'dead' and (older or same) then return refuse(claim, 'duplicate') end
  if state.status == 'replaying' and older then return refuse(claim, 'duplicate') end
  if state.status == 'waiting' and older and NOW < state['until'] + claim.lease then
    -- Its retry may still be published; once that is overdue by a lease, this delivery stands in for it.
    return refuse(claim, 'busy', state['until'] + claim.lease - NOW)
  end
  if state.status == 'running' and NOW < state['until'] then
    -- An older copy too: it may be the one that stands in, handed over once more.
    return refuse(claim, 'busy', state['until'] - NOW)
  end
  return nil
end

-- once="index": a record of the index settles it, a running holder makes wait; waiting and dead hold nothing.
local function check_index(claim, record, state)
  if record and record.digest == claim.digest then
    forget(state)
    return refuse(claim, 'duplicate')
  end
  if record then return refuse(claim, 'conflict') end
  local id = redis.call('GET', of_index('h', claim.topic, claim.index))
  local holder = id and id ~= claim.id and read_state(id)
  if holder and holder.status == 'running' and NOW < holder['until'] then
    return refuse(claim, 'busy', holder['until'] - NOW)
  end
  redis.call('SET', of_index('h', claim.topic, claim.index), claim.id)
  return nil
end

local function grant(claim, state)
  local events, copy, crashes = {}, claim.copy, 0
  if not state then
    events[1] = event(micros(claim.sent_at), 'sent', claim.note, claim.expires)
  else
    copy, crashes = math.max(copy, state.copy), state.crashes
    if state.status == 'replaying' or state.status == 'dead' then
      -- The replay arrived: it starts afresh, and its letter need not be listed any longer.
      drop_letter(claim.id)
      crashes, state.progress = 0, nil
      redis.call('HDEL', of_id('s', claim.id), 'progress')
    elseif state.status == 'running' and state.copy == copy and state.started then
      -- The same copy again after its lease: its handler took the worker down.
      crashes = crashes + 1
    end
    keep_state(state)
  end
  local token = next_token()
  local first = state and state.first > 0 and state.first or token
  local carried = math.max(state and state.carried or 0, claim.copy)
  local fields = {'copy', copy, 'carried', carried, 'status', 'running', 'token', digits(token), 'first', digits(first),
    'worker', claim.worker, 'nonce', claim.nonce, 'until', digits(NOW + claim.lease), 'crashes', crashes, 'topic', claim.topic,
    'index', claim.index}
  for flag, is_set in pairs({started = claim.started, exclusive = claim.once == 'index'}) do
    if is_set then
      fields[#fields + 1], fields[#fields + 2] = flag, 1
    elseif state then
      redis.call('HDEL', of_id('s', claim.id), flag)
    end
  end
  redis.call('HSET', of_id('s', claim.id), unpack(fields))
  events[#events + 1] = event(NOW, 'attempt', claim.note, claim.expires)
  tell(claim.topic, claim.index, claim.retention, events)
  return {'granted', token, copy, state and state.progress or false, crashes, NOW}
end

local function claim_one(claim)
  local record, state = read_record(claim.topic, claim.index), read_state(claim.id)
  -- Done: its record says so, or the mark it left when the record was replaced or removed.
  if (record and record.id == claim.id) or mark_token(claim.id) then
    forget(state)
    return refuse(claim, 'duplicate')
  end
  if state and is_asked_again(claim, state) then
    redis.call('HSET', of_id('s', claim.id), 'until', digits(NOW + claim.lease))
    return {'granted', state.token, state.copy, state.progress or false, state.crashes, NOW}
  end
  local refused = state and check_copy(claim, state)
  if refused then return refused end
  if claim.once == 'index' then
    refused = check_index(claim, record, state)
    if refused then return refused end
  end
  return grant(claim, state)
end

local answers = {}
for number, values in ipairs(REQUEST) do
  local claim = named(NAMES, values)
  claim.lease, claim.note, claim.expires = micros(claim.lease), take(), expiry(claim.retention, NOW)
  answers[number] = claim_one(claim)
end
return finish(answers)
