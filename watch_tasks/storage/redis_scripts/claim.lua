-- May these copies be handled now? One answer for each, in order (protocol §2, §3).
-- Answers: {'granted', token, copy, progress, crashes, now}, or {why, µs until asking again}.

-- Why a claim is refused: {why, µs until asking again}, or nil where it is not.
local function get_refusals()
  local refusals = {}

  function refusals.refuse(claim, why, wait)
    if why == 'duplicate' then count(claim.topic, 'duplicates', 1) end
    if why ~= 'conflict' then
      local kind = why == 'busy' and 'busy' or 'suppressed'
      local is_owned = claim.stored or get_states().owns(claim.state, claim.topic, claim.index)
      tell(claim.topic, claim.index, claim.expires, {{NOW, kind, claim.note}}, is_owned)
    end
    return {why, wait or 0}
  end

  -- Compare the copy with what is known; nil: it may be claimed.
  function refusals.check_copy(claim, state)
    local older, same = claim.copy < state.copy, claim.copy == state.copy
    local is_alive = state.status == 'running' or state.status == 'waiting'
    -- A higher copy was delivered and claimed: this one is stale, whatever became of that lease.
    if is_alive and claim.copy < state.carried then return {'stale', 0} end
    if state.status == 'dead' and (older or same) then return refusals.refuse(claim, 'duplicate') end
    if state.status == 'replaying' and older then return refusals.refuse(claim, 'duplicate') end
    if state.status == 'waiting' and older and NOW < state['until'] + claim.lease then
      -- Its retry may still be published; once that is overdue by a lease, this delivery stands in for it.
      return refusals.refuse(claim, 'busy', state['until'] + claim.lease - NOW)
    end
    if state.status == 'running' and NOW < state['until'] then
      -- An older copy too: it may be the one that stands in, handed over once more.
      return refusals.refuse(claim, 'busy', state['until'] - NOW)
    end
    return nil
  end

  -- once="index": a record of the index settles it, a running holder makes wait; waiting and dead hold nothing.
  function refusals.check_index(claim, record, state)
    if record then
      if digest_of(record) ~= claim.digest then
        return refusals.refuse(claim, 'conflict')
      end
      get_states().forget(state, claim.topic, claim.index)
      return refusals.refuse(claim, 'duplicate')
    end
    local key = of_topic('h', claim.topic) .. ':' .. claim.index
    local id = redis.call('GET', key)
    local holder = id and id ~= claim.id and get_states().read_state(id)
    if holder and holder.status == 'running' and NOW < holder['until'] then
      return refusals.refuse(claim, 'busy', holder['until'] - NOW)
    end
    redis.call('SET', key, claim.id)
    return nil
  end

  return refusals
end

local function grant(claim, state)
  local events = {}
  if not state then
    events[1] = {claim.sent_at, 'sent', claim.note}
    state = new_state(claim.id, 'waiting', claim.copy)
  else
    if state.status == 'replaying' or state.status == 'dead' then
      -- The replay arrived: it starts afresh, and its letter need not be listed any longer.
      get_states().drop_letter(claim.id)
      state.crashes, state.progress, state.lettered = 0, false, false
    elseif state.status == 'running' and state.copy >= claim.copy and state.started then
      -- The same copy again after its lease: its handler took the worker down.
      state.crashes = state.crashes + 1
    end
    state.copy = math.max(claim.copy, state.copy)
  end
  local topic, index = state.topic, state.index
  state.status, state.token, state.worker, state.nonce = 'running', next_token(), claim.worker, claim.nonce
  if state.first == 0 then state.first = state.token end
  state.carried, state['until'], state.expires = math.max(state.carried, claim.copy), NOW + claim.lease, 0
  state.started, state.exclusive, state.topic, state.index = claim.started, claim.once == 'index', claim.topic, claim.index
  save(state)
  if index and (topic ~= claim.topic or index ~= claim.index) then disown(topic, index) end
  events[#events + 1] = {NOW, 'attempt', claim.note}
  tell(claim.topic, claim.index, claim.expires, events, true)
  return {'granted', state.token, state.copy, state.progress, state.crashes, NOW}
end

local function claim_one(claim)
  local record, stored = read_record(claim.topic, claim.index)
  local found = redis.call('MGET', PREFIX .. 's:' .. claim.id, PREFIX .. 'm:' .. claim.id)
  local state = parse_state(claim.id, found[1])
  claim.stored, claim.state = stored, state
  -- Done: its record says so, or the mark it left when the record was replaced or removed.
  if (record and id_of(record) == claim.id) or parse_mark(found[2]) then
    get_states().forget(state, claim.topic, claim.index)
    return get_refusals().refuse(claim, 'duplicate')
  end
  -- This very claim was granted, and its answer lost: refused now, it would count as a crash later.
  if state and claim.nonce ~= '' and claim.nonce == state.nonce and claim.worker == state.worker and is_held(state) then
    state['until'] = NOW + claim.lease
    save(state)
    return {'granted', state.token, state.copy, state.progress, state.crashes, NOW}
  end
  local refused = state and get_refusals().check_copy(claim, state)
  if not refused and claim.once == 'index' then refused = get_refusals().check_index(claim, record, state) end
  return refused or grant(claim, state)
end

local function claim_of(run, number)
  local id, copies, nonces, digests, notes = run.ids[number], run.copies, run.nonces, run.digests, run.notes
  local copy = type(copies) == 'table' and copies[number] or copies
  local note = type(notes) == 'table' and notes[number] or notes
  return {
    topic = run.topic, index = run.indexes[number], id = id, copy = copy, once = run.once, worker = run.worker,
    lease = run.lease, expires = NOW + (run.retention or NEVER), sent_at = run.sent[number],
    nonce = type(nonces) == 'table' and nonces[number] or nonces, started = run.started,
    note = run.is_plain and get_folded().note_of(id, copy, note) or note,
    digest = type(digests) == 'table' and digests[number] or digests,
  }
end

-- Whether nothing is known of one of a plain run.
local function is_fresh(run, number)
  if run.records and run.records[number] then return false end
  local topic, id, index = run.topic, run.ids[number], run.indexes[number]
  return redis.call('EXISTS', PREFIX .. 's:' .. id, PREFIX .. 'm:' .. id, story_key(topic, index)) == 0
    and redis.call('HEXISTS', of_topic('r', topic), index) == 0
    and (run.once ~= 'index' or redis.call('EXISTS', of_topic('h', topic) .. ':' .. index) == 0)
end

for number = rest, #runs do
  local run, first = runs[number], 1
  while run.ids[first] do
    local last = first - 1
    while run.is_plain and run.ids[last + 1] and is_fresh(run, last + 1) do last = last + 1 end
    if last >= first then
      local token = next_token()
      grant_fresh(run, first, last, token, 'MSET')
      last_token = token + last - first
      for granted = token, last_token do answers[#answers + 1] = granted end
    else
      last, answers[#answers + 1] = first, claim_one(claim_of(run, first))
    end
    first = last + 1
  end
end
return finish({NOW, false, unpack(answers)})
