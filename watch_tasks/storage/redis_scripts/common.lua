-- What all scripts share: keys, time, tokens, and the form of records, marks, states and stories.
--
-- ARGV[1]  prefix of every key
-- ARGV[2]  now, in µs since the epoch; '' for the server's own clock
-- ARGV[3]  the request, as MessagePack
-- ARGV[4…] the opaque bytes of the request, in the order in which `take` gives them out
--
-- Times and tokens are whole µs. A Lua number holds them exactly up to 2^53, which is the year 2255.

local PREFIX = ARGV[1]
local NOW = tonumber(ARGV[2])
local REQUEST = cmsgpack.unpack(ARGV[3])
local NEVER = math.huge
local STORY_LENGTH = 200
-- Seconds that is kept what belongs to no topic whose retention is known.
local WEEK = 604800

if not NOW then
  local time = redis.call('TIME')
  NOW = time[1] * 1000000 + time[2]
end

local taken = 3
local function take()
  taken = taken + 1
  return ARGV[taken]
end

-- Name the values of one item of the request.
local function named(names, values)
  local item = {}
  for number, name in ipairs(names) do item[name] = values[number] end
  return item
end

-- Never `tostring`: it keeps only 14 digits.
local function digits(number) return string.format('%.0f', number) end

local function micros(seconds) return math.floor(seconds * 1000000 + 0.5) end

local function expiry(retention, from)
  if not retention then return NEVER end
  return from + micros(retention)
end

-- Milliseconds for PX, within what the server takes.
local function px(expires) return digits(math.min(math.max(math.ceil((expires - NOW) / 1000), 1), 1e14)) end

local function set_until(key, value, expires)
  if expires == NEVER then
    redis.call('SET', key, value)
  else
    redis.call('SET', key, value, 'PX', px(expires))
  end
end

-- Keys. A valid topic has no ':'; one that nobody knows may have, and must not reach the keys of another.

local ESCAPES = {['%'] = '%25', [':'] = '%3A'}

local function of_topic(kind, topic)
  return PREFIX .. kind .. ':' .. string.gsub(topic, '[%%:]', ESCAPES)
end

local function of_index(kind, topic, index) return of_topic(kind, topic) .. ':' .. index end

local function of_id(kind, id) return PREFIX .. kind .. ':' .. id end

-- Tokens: one counter for the whole storage, at least the clock, so that a lost counter hands out no old token again.

-- It is written once, by `finish`.

local last_token
local function next_token()
  last_token = last_token or tonumber(redis.call('GET', PREFIX .. 'token') or 0)
  last_token = math.max(last_token + 1, NOW)
  return last_token
end

-- Stories: the newest events of an index. Each event says until when its story is kept.

local function event(at, kind, note, expires) return struct.pack('>ddBc0', at, expires, #kind, kind) .. note end

-- The server ends a story by its own clock only; by another one, it is ended here.
local function end_story(key)
  local latest = 0
  for _, told in ipairs(redis.call('LRANGE', key, 0, -1)) do
    local _, expires = struct.unpack('>dd', told)
    latest = math.max(latest, expires)
  end
  if latest <= NOW then redis.call('DEL', key) end
end

local function tell(topic, index, retention, events)
  if #events == 0 then return end
  local key = of_index('t', topic, index)
  if ARGV[2] ~= '' then end_story(key) end
  local length = redis.call('RPUSH', key, unpack(events))
  if length > STORY_LENGTH then redis.call('LTRIM', key, -STORY_LENGTH, -1) end
  if not retention then return redis.call('PERSIST', key) end
  -- An end that comes up to a hundredth early is not worth a write with each event.
  local left = length > #events and redis.call('PTTL', key) or 0
  local wanted = px(expiry(retention, NOW))
  if left ~= -1 and left < tonumber(wanted) * 0.99 then redis.call('PEXPIRE', key, wanted) end
end

-- Counters, added up over the request and written once, by `finish`.

local counted = {}
local function count(topic, name, by)
  local counts = counted[topic] or {}
  counted[topic] = counts
  if name then counts[name] = (counts[name] or 0) + by end
end

-- Marks: an id is done, where no record says so.

local function write_mark(id, token, expires)
  if expires > NOW then set_until(of_id('m', id), struct.pack('>dd', token, expires), expires) end
end

local function mark_token(id)
  local mark = redis.call('GET', of_id('m', id))
  if not mark then return nil end
  local token, expires = struct.unpack('>dd', mark)
  if expires > NOW then return token end
  return nil
end

-- Records: a header, then the blob. `z` has them by the time they were handled, `x` by the time they expire.

local function read_record(topic, index)
  local key = of_index('r', topic, index)
  local head = redis.call('GETRANGE', key, 0, 255)
  if head == '' then return nil end
  local at, expires, first, token, size = struct.unpack('>ddddI4', head)
  if #head == 256 and size > 100 then head = redis.call('GET', key) end
  local id, digest = struct.unpack('>I4c0Hc0', head, 33)
  if expires <= NOW then return nil end
  return {at = at, expires = expires, first = first, token = token, id = id, digest = digest}
end

local function forget_record(topic, index)
  redis.call('DEL', of_index('r', topic, index))
  redis.call('ZREM', of_topic('z', topic), index)
  redis.call('ZREM', of_topic('x', topic), index)
end

-- One record per index: what it replaces leaves the mark of its id.
local function write_record(topic, index, old, new, blob)
  if old and old.id ~= new.id then write_mark(old.id, old.token, old.expires) end
  if new.expires <= NOW then return forget_record(topic, index) end
  local head = struct.pack('>ddddI4c0Hc0', new.at, new.expires, new.first, new.token, #new.id, new.id, #new.digest, new.digest)
  set_until(of_index('r', topic, index), head .. blob, new.expires)
  redis.call('ZADD', of_topic('z', topic), digits(new.at), index)
  if new.expires == NEVER then
    redis.call('ZREM', of_topic('x', topic), index)
  else
    redis.call('ZADD', of_topic('x', topic), digits(new.expires), index)
  end
end

-- States: what is known of an unfinished message. Fields are absent where nothing is known. `copy` is the newest known,
-- `carried` the newest that a delivery brought: `copy` may be one that was never published.

local FIELDS = {
  'copy', 'carried', 'status', 'token', 'first', 'worker', 'nonce', 'until', 'started', 'exclusive', 'crashes', 'progress', 'topic',
  'index', 'expires',
}
local NUMBERS = {
  copy = true, carried = true, token = true, first = true, ['until'] = true, crashes = true, expires = true,
}

local function read_state(id)
  local values = redis.call('HMGET', of_id('s', id), unpack(FIELDS))
  if not values[1] then return nil end
  local state = {id = id}
  for number, name in ipairs(FIELDS) do
    local value = values[number] or nil
    if NUMBERS[name] then value = tonumber(value or 0) end
    state[name] = value
  end
  if state.expires > 0 and state.expires <= NOW then
    redis.call('DEL', of_id('s', id))
    return nil
  end
  return state
end

-- Nothing waits for it: it is forgotten after a week.
local function expire_state(id)
  local expires = NOW + micros(WEEK)
  redis.call('HSET', of_id('s', id), 'expires', digits(expires))
  redis.call('PEXPIRE', of_id('s', id), px(expires))
end

-- Something waits for it again.
local function keep_state(state)
  if state.expires == 0 then return end
  redis.call('HDEL', of_id('s', state.id), 'expires')
  redis.call('PERSIST', of_id('s', state.id))
end

-- An expired lease that nobody took over still counts; under once="index", so does only who holds the index.
local function is_held(state)
  if state.status ~= 'running' then return false end
  return not state.exclusive or redis.call('GET', of_index('h', state.topic, state.index)) == state.id
end

local function give_up(state)
  if not state.exclusive then return end
  local key = of_index('h', state.topic, state.index)
  if redis.call('GET', key) == state.id then redis.call('DEL', key) end
end

-- Dead letters: `l:` has those of a topic by time, `letters` all.

local function read_letter_topic(id)
  local head = redis.call('GETRANGE', of_id('d', id), 0, 511)
  if head == '' then return nil end
  local size = struct.unpack('>I4', head, 9)
  if size > 499 then head = redis.call('GET', of_id('d', id)) end
  return (struct.unpack('>I4c0', head, 9))
end

local function drop_letter(id)
  local topic = read_letter_topic(id)
  if not topic then return false end
  redis.call('DEL', of_id('d', id))
  redis.call('ZREM', PREFIX .. 'letters', id)
  redis.call('ZREM', of_topic('l', topic), id)
  return true
end

-- It is done for good: nothing unfinished is known of it any more, and it is not listed as dead. Whatever has a letter
-- has a state.
local function forget(state)
  if not state then return end
  drop_letter(state.id)
  give_up(state)
  redis.call('DEL', of_id('s', state.id))
end

-- The time-ordered sets keep members of records that the server expired until some later write trims them:
-- a bounded number each time, but more than a write can add.

local function trim(topic, most)
  local over = redis.call('ZRANGEBYSCORE', of_topic('x', topic), '-inf', digits(NOW), 'LIMIT', 0, most)
  if #over == 0 then return end
  redis.call('ZREM', of_topic('x', topic), unpack(over))
  redis.call('ZREM', of_topic('z', topic), unpack(over))
end

-- Write the counters and the last token, and tidy up: the topics of this request, and any one, so that a silent topic is tidied too.
local function finish(result, written)
  if last_token then redis.call('SET', PREFIX .. 'token', digits(last_token)) end
  for topic, counts in pairs(counted) do
    redis.call('SADD', PREFIX .. 'topics', topic)
    for name, by in pairs(counts) do redis.call('HINCRBY', of_topic('c', topic), name, by) end
  end
  if written then
    local most = math.min(2 * written, 1000)
    for topic in pairs(counted) do trim(topic, most) end
    local any = redis.call('SRANDMEMBER', PREFIX .. 'topics')
    if any and not counted[any] then trim(any, most) end
  end
  return result
end
