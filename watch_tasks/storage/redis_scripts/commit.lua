-- Settle these messages, each accepted (1) or refused (0) alone (protocol §1, §2).

-- What few commits need.
local function get_steps()
  local steps = {}

  -- Was this very commit accepted before, and its answer lost? A handled one is answered by its record or mark.
  function steps.is_repeated(commit, state)
    if not state or state.token ~= commit.token then return false end
    if commit.step == 'retry' or commit.step == 'snoozed' then
      return state.status == 'waiting' and state.copy == commit.copy + 1
    elseif commit.step == 'released' then
      return state.status == 'waiting' and state.copy == commit.copy
    end
    if commit.step == 'mark' then return state.status == 'running' and state.progress == commit.blob end
    return commit.step == 'dead' and state.status == 'dead'
  end

  function steps.wait(commit, state)
    state.copy, state.status = commit.step == 'released' and commit.copy or commit.copy + 1, 'waiting'
    state['until'], state.progress = NOW + commit.delay, commit.blob
    save(state)
    get_states().give_up(state)
  end

  -- Return the state of the dead.
  function steps.bury(commit, state)
    get_states().drop_letter(commit.id)
    redis.call('SET', PREFIX .. 'd:' .. commit.id, struct.pack('>dI4c0', NOW, #commit.topic, commit.topic) .. commit.blob)
    redis.call('ZADD', PREFIX .. 'letters', digits(NOW), commit.id)
    redis.call('ZADD', of_topic('l', commit.topic), digits(NOW), commit.id)
    count(commit.topic)
    if not state then
      state = new_state(commit.id, 'dead', commit.copy)
      if commit.index then state.topic, state.index = commit.topic, commit.index end
    end
    state.lettered = true
    -- Somebody handles a readable message of that id: leave it to them.
    if commit.token or state.status ~= 'running' or NOW >= state['until'] then
      -- It takes over: an older claim settles nothing any more.
      if not commit.token and state.token > 0 then state.token = next_token() end
      state.copy, state.status, state.expires = math.max(state.copy, commit.copy), 'dead', 0
      get_states().give_up(state)
    end
    save(state)
    return state
  end

  -- Unclaimed: nothing is fenced, but an id is buried once, and not after it was done.
  function steps.is_buried(commit, state, is_done)
    local is_dead = state and state.status == 'dead' and commit.copy <= state.copy
    -- A replay that died unread is buried again: its letter is of the copy before, whose redelivery is dead still.
    local is_replay = state and state.status == 'replaying' and commit.copy >= state.copy
    is_dead = is_dead or state and state.status == 'replaying' and not is_replay
    return is_done or is_dead or (not is_replay and state and state.lettered)
  end

  return steps
end

-- Return whether there is a record now.
local function handle(commit, state, record, stored)
  local token, is_kept = commit.token or next_token(), true
  local first = state and state.first > 0 and state.first or token
  if record and record.first > first and not is_of(record, commit.short_id) then
    -- A newer message of this index was handled while this one ran: it keeps the record.
    get_changes().write_mark(commit.id, token, commit.expires)
  else
    local new = {at = NOW, retention = commit.retention, first = first, token = token, id = commit.short_id,
      digest = commit.digest}
    is_kept = write_record(commit.topic, commit.index, record, stored, new, commit.blob)
  end
  count(commit.topic, 'handled', 1)
  if not state or state.lettered or state.exclusive or state.index ~= commit.index or state.topic ~= commit.topic then
    get_states().forget(state, commit.topic, commit.index)
  else
    redis.call('DEL', PREFIX .. 's:' .. state.id)
    state.is_gone = true
  end
  return is_kept
end

local function commit_one(commit)
  local found = redis.call('MGET', PREFIX .. 's:' .. commit.id, PREFIX .. 'm:' .. commit.id)
  local state, mark, record, stored = parse_state(commit.id, found[1]), parse_mark(found[2]), nil, nil
  if commit.index then record, stored = read_record(commit.topic, commit.index) end
  local is_done = record and is_of(record, commit.short_id)
  local events, answer, is_kept = {}, 1, stored
  if not commit.token then
    if commit.step == 'dead' and get_steps().is_buried(commit, state, mark or is_done) then return 1 end
  elseif commit.step == 'handled' then
    if (is_done and record.token == commit.token) or mark == commit.token then return 1 end
  elseif get_steps().is_repeated(commit, state) then
    return 1
  end
  if commit.token and (not state or state.token ~= commit.token or not is_held(state)) then
    answer, events = 0, {{NOW, 'fenced', #commit.events > 0 and commit.events[#commit.events][3] or '{}'}}
  else
    if commit.step == 'handled' then
      is_kept = handle(commit, state, record, stored)
    elseif commit.step == 'dead' then
      state = get_steps().bury(commit, state)
    elseif state and commit.token then
      if commit.step == 'mark' then
        state.progress = commit.blob
        save(state)
      else
        get_steps().wait(commit, state)
      end
    end
    if commit.step == 'retry' then count(commit.topic, 'retries', 1) end
    events = commit.events
  end
  if commit.index and #events == 0 then
    open_story(commit.topic, commit.index)
  elseif commit.index then
    tell(commit.topic, commit.index, commit.expires, events, is_kept or get_states().owns(state, commit.topic, commit.index))
  end
  return answer
end

-- Of a run: what stands in a record, in parts.
local function commit_of(run, number)
  local chunk, id, copies = run.chunks[number], string.sub(run.keys[number], #PREFIX + 3), run.copies
  local digest = behind_text(chunk, 1)
  local behind, copy = behind_text(chunk, digest), type(copies) == 'table' and copies[number] or copies
  local events, size, place = struct.unpack('>I2c0I2', chunk, behind)
  return {
    topic = run.topic, index = run.indexes[number], step = 'handled', id = id, copy = copy, token = run.tokens[number],
    retention = run.retention, expires = NOW + (run.retention or NEVER), events = get_folded().add({}, events, id, copy, NOW),
    blob = string.sub(chunk, place, place + size - 1), short_id = string.sub(chunk, 1, digest - 1),
    digest = string.sub(chunk, digest, behind - 1),
  }
end

local answers, written = {}, 0
for _, run in ipairs(runs) do
  local before, left = #answers, {}
  for number = 1, #run.keys do
    if run.settled[number] then
      answers[before + number] = 1
    else
      answers[before + number] = commit_one(commit_of(run, number))
      left[#left + 1] = {run.topic, run.indexes[number]}
    end
  end
  write_orders(left)
  written = written + #run.keys
  if run.over then get_order(run.topic, digits(run.retention)) end
end

local commits, sorted, before = REQUEST[2], REQUEST[3], #answers
for number, values in ipairs(commits) do
  local blob, id_size, both, events = take(), values[10], values[10] + values[11], {}
  for place, kind in ipairs(values[9]) do events[place] = {NOW, kind, take()} end
  answers[before + number] = commit_one({
    topic = values[1], index = values[2], step = values[3], id = values[4], copy = values[5], token = values[6],
    retention = values[7], expires = NOW + (values[7] or NEVER), delay = values[8], events = events,
    blob = string.sub(blob, both + 1), short_id = string.sub(blob, 1, id_size),
    digest = string.sub(blob, id_size + 1, both),
  })
end
for number, place in ipairs(sorted) do sorted[number] = commits[place] end
write_orders(sorted)
trim_orders(2 * (written + #commits))
return finish(answers)
