-- Settle these messages, each accepted (1) or refused (0) alone (protocol §1, §2).

local NAMES = {'step', 'topic', 'index', 'id', 'copy', 'token', 'digest', 'retention', 'delay', 'kinds'}

-- Was this very commit accepted before, and its answer lost?
local function is_repeated(commit, state, record)
  if commit.step == 'handled' then
    return (record and record.id == commit.id and record.token == commit.token) or mark_token(commit.id) == commit.token
  end
  if not state or state.token ~= commit.token then return false end
  if commit.step == 'retry' or commit.step == 'snoozed' then
    return state.status == 'waiting' and state.copy == commit.copy + 1
  elseif commit.step == 'released' then
    return state.status == 'waiting' and state.copy == commit.copy
  end
  if commit.step == 'mark' then return state.status == 'running' and state.progress == commit.blob end
  return commit.step == 'dead' and state.status == 'dead'
end

local function handled(commit, state, record)
  local token = commit.token or next_token()
  local first = state and state.first > 0 and state.first or token
  local expires = expiry(commit.retention, NOW)
  if record and record.id ~= commit.id and record.first > first then
    -- A newer message of this index was handled while this one ran: it keeps the record.
    write_mark(commit.id, token, expires)
  else
    local new = {at = NOW, expires = expires, first = first, token = token, id = commit.id, digest = commit.digest}
    write_record(commit.topic, commit.index, record, new, commit.blob)
  end
  count(commit.topic, 'handled', 1)
  forget(state)
end

local function waits(commit, state)
  local copy = commit.step == 'released' and commit.copy or commit.copy + 1
  redis.call('HSET', of_id('s', commit.id), 'copy', copy, 'status', 'waiting',
    'until', digits(NOW + micros(commit.delay)), 'progress', commit.blob)
  give_up(state)
end

local function bury(commit, state)
  drop_letter(commit.id)
  redis.call('SET', of_id('d', commit.id), struct.pack('>dI4c0', NOW, #commit.topic, commit.topic) .. commit.blob)
  redis.call('ZADD', PREFIX .. 'letters', digits(NOW), commit.id)
  redis.call('ZADD', of_topic('l', commit.topic), digits(NOW), commit.id)
  count(commit.topic)
  -- Somebody handles a readable message of that id: leave it to them.
  if not commit.token and state and state.status == 'running' and NOW < state['until'] then return end
  redis.call('HSET', of_id('s', commit.id), 'copy', math.max(state and state.copy or 0, commit.copy), 'status', 'dead')
  if not state and commit.index then
    redis.call('HSET', of_id('s', commit.id), 'topic', commit.topic, 'index', commit.index)
  end
  if state then
    -- It takes over: an older claim settles nothing any more.
    if not commit.token and state.token > 0 then
      redis.call('HSET', of_id('s', commit.id), 'token', digits(next_token()))
    end
    keep_state(state)
    give_up(state)
  end
end

local function commit_one(commit)
  local state = read_state(commit.id)
  local record = commit.index and read_record(commit.topic, commit.index)
  local owned = state and commit.token
  if not commit.token then
    -- Unclaimed: nothing is fenced, but an id is buried once, and not after it was done.
    local done = mark_token(commit.id) or (record and record.id == commit.id)
    local dead = state and state.status == 'dead' and commit.copy <= state.copy
    -- A replay that died unread is buried again: its letter is of the copy before, whose redelivery is dead still.
    local is_replay = state and state.status == 'replaying' and commit.copy >= state.copy
    dead = dead or state and state.status == 'replaying' and not is_replay
    local is_listed = not is_replay and redis.call('EXISTS', of_id('d', commit.id)) == 1
    if commit.step == 'dead' and (done or dead or is_listed) then return 1 end
  elseif is_repeated(commit, state, record) then
    return 1
  elseif not state or state.token ~= commit.token or not is_held(state) then
    if commit.index then
      local note = commit.notes[#commit.notes] or '{}'
      tell(commit.topic, commit.index, commit.retention, {event(NOW, 'fenced', note, commit.expires)})
    end
    return 0
  end
  if commit.step == 'handled' then
    handled(commit, state, record)
  elseif commit.step == 'dead' then
    bury(commit, state)
  elseif commit.step == 'mark' then
    if owned then redis.call('HSET', of_id('s', commit.id), 'progress', commit.blob) end
  elseif owned then
    waits(commit, state)
  end
  if commit.step == 'retry' then count(commit.topic, 'retries', 1) end
  if commit.index then
    local events = {}
    for number, kind in ipairs(commit.kinds) do
      events[number] = event(NOW, kind, commit.notes[number], commit.expires)
    end
    tell(commit.topic, commit.index, commit.retention, events)
  end
  return 1
end

local answers = {}
for number, values in ipairs(REQUEST) do
  local commit = named(NAMES, values)
  commit.blob, commit.notes, commit.expires = take(), {}, expiry(commit.retention, NOW)
  for place in ipairs(commit.kinds) do commit.notes[place] = take() end
  answers[number] = commit_one(commit)
end
return finish(answers, #answers)
