-- Stories: the newest events of an index. Each event says until when the story is kept as far as is known by then.
--
-- `t:<topic>:<index>` is a list of them, or the id of the one message of that index, which is at its first try: its state
-- has the events folded into it. Those of the message that has the record may be folded into that; the story goes on in
-- the list where the first event there is flagged as one that continues it.
--
-- A story ends with the record of its index, when that is trimmed, and has no time to live of its own as long as there
-- is a record or an unfinished message: a million of them would end in one burst of the server's. Where there is
-- neither (nobody *owns* it), the server ends it; its last event is then flagged.

local STORY_LENGTH = 200
-- Added to the length of an event's kind: it is the last of a story that the server ends; it continues a folded one.
local TIMED, CONTINUES = 128, 64

local function story_key(topic, index) return of_topic('t', topic) .. ':' .. index end

-- An event as it is in a list; `flags` may be left out.
local function pack_event(event, ends, flags)
  return struct.pack('>ddBc0', event[1], ends, #event[2] + (flags or 0), event[2]) .. event[3]
end

local function continues(event) return select(3, struct.unpack('>ddB', event)) % TIMED >= CONTINUES end

-- What few calls need: the events that are folded into states and records, as {at, kind, note} of each.
local folded
local function get_folded()
  if folded then return folded end
  folded = {}

  -- Most notes begin with the id and the copy, and have these left out.
  function folded.note_of(id, copy, note)
    if string.byte(note) == 123 then return note end
    return '{"id":"' .. id .. '","copy":' .. digits(copy) .. ',' .. note
  end

  -- Those of a claim, which begin at a place; and the copy.
  function folded.begin(id, value, place)
    local copy, sent, at, behind = struct.unpack('>I4dd', value, place)
    local note = folded.note_of(id, copy, string.sub(value, behind))
    return {{sent, 'sent', note}, {at, 'attempt', note}}, copy
  end

  -- Those of a state, and the end of their story.
  function folded.of_state(id, value)
    local head, place = struct.unpack('>I2I2', value, 10)
    local events = folded.begin(id, value, place)
    local retention = struct.unpack('>d', value, place - 8)
    return events, retention < 0 and NEVER or events[2][1] + retention, head
  end

  -- Add those of a commit.
  function folded.add(events, packed, id, copy, at)
    local place, kind, note = 1, nil, nil
    while place <= #packed do
      kind, note, place = struct.unpack('>Bc0I2c0', packed, place)
      events[#events + 1] = {at, kind, folded.note_of(id, copy, note)}
    end
    return events
  end

  function folded.of_record(record)
    local value, id = record.value, id_of(record)
    local packed, size, place = struct.unpack('>I2c0I2', value, behind_text(value, behind_text(value, record.place)))
    local events, copy = folded.begin(id, value, place + size)
    return folded.add(events, packed, id, copy, record.at)
  end

  -- The state of an id is written in the long form: its events become a list, if they are not over.
  function folded.unfold_state(id, value, topic, index)
    local key, events, ends = story_key(topic, index), folded.of_state(id, value)
    redis.call('DEL', key)
    if ends > NOW then redis.call('RPUSH', key, pack_event(events[1], ends), pack_event(events[2], ends)) end
  end

  -- A record is written over or forgotten: its events stay for as long as the story does. The caller says whose it is.
  function folded.unfold_record(topic, index, record)
    if not record.folded then return end
    local key, events = story_key(topic, index), {}
    local first = redis.call('LINDEX', key, 0)
    if first and not continues(first) or not first and record.expires <= NOW then return end
    for number, event in ipairs(folded.of_record(record)) do table.insert(events, 1, pack_event(event, record.expires)) end
    redis.call('LPUSH', key, unpack(events))
    redis.call('LTRIM', key, -STORY_LENGTH, -1)
  end

  return folded
end

-- Defined with the states.
local unfold_state

-- Let the story of an index be a list, if there is one; returns its key, and whether there is.
local function open_story(topic, index)
  local key = story_key(topic, index)
  local kind = redis.call('TYPE', key).ok
  if kind == 'string' then
    local id = redis.call('GET', key)
    local state = redis.call('GET', PREFIX .. 's:' .. id)
    if state and string.sub(state, 1, 1) == TAG then
      unfold_state(id, state)
    else
      -- Somebody removed the state by hand, and its events with it.
      redis.call('DEL', key)
    end
  end
  return key, kind ~= 'none'
end

-- `events` has {at, kind, note} of each.
local function tell(topic, index, expires, events, is_owned)
  if #events == 0 then return end
  local key, is_begun = open_story(topic, index)
  local last, was_timed, first_flag = is_begun and redis.call('LINDEX', key, -1), false, 0
  if last then
    local _, ends, size = struct.unpack('>ddB', last)
    if ends <= NOW then
      redis.call('UNLINK', key)
    else
      expires, was_timed = math.max(expires, ends), size >= TIMED
    end
  else
    local record = read_record(topic, index)
    if record and record.folded then expires, first_flag = math.max(expires, record.expires), CONTINUES end
  end
  local is_timed = not is_owned and expires < NEVER
  for number, told in ipairs(events) do
    local last_flag = is_timed and number == #events and TIMED or 0
    events[number] = pack_event(told, expires, last_flag + (number == 1 and first_flag or 0))
  end
  if redis.call('RPUSH', key, unpack(events)) > STORY_LENGTH then redis.call('LTRIM', key, -STORY_LENGTH, -1) end
  if is_timed then
    redis.call('PEXPIRE', key, px(expires))
  elseif was_timed then
    redis.call('PERSIST', key)
  end
end

-- A record or an unfinished message of the index is gone. Where none is left, the server is to end the story when its
-- time is over. A record that is over and not trimmed yet is one: its story ends with it.
local function disown(topic, index, is_forgotten)
  if not index or (not is_forgotten and redis.call('HEXISTS', of_topic('r', topic), index) == 1) then return end
  local key = story_key(topic, index)
  if redis.call('TYPE', key).ok ~= 'list' then return end
  local last = redis.call('LINDEX', key, -1)
  local _, ends, size = struct.unpack('>ddB', last)
  if ends <= NOW then
    redis.call('UNLINK', key)
  elseif ends < NEVER and size < TIMED then
    redis.call('LSET', key, -1, string.sub(last, 1, 16) .. string.char(size + TIMED) .. string.sub(last, 18))
    redis.call('PEXPIRE', key, px(ends))
  end
end
