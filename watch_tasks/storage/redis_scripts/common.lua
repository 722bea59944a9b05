-- What all scripts share: keys, time, tokens, counters, marks.
--
-- ARGV[1]  prefix of every key
-- ARGV[2]  now, in µs since the epoch; '' for the server's own clock
-- ARGV[3]  the request, as MessagePack
-- ARGV[4…] the opaque bytes of the request, in the order in which `take` gives them out
--
-- Times, spans of time and tokens are whole µs. A Lua number holds them exactly up to 2^53, which is the year 2255.
-- Every function costs up to a µs whenever its script runs, used or not. So a script has only the parts it needs, and of
-- these, what few calls need is made by one function that returns the others, when one of them is called for.

local PREFIX = ARGV[1]
local NOW = tonumber(ARGV[2])
local REQUEST = cmsgpack.unpack(ARGV[3])
local NEVER = math.huge
local LAYOUT = 2
-- µs that is kept what belongs to no topic whose retention is known.
local WEEK = 604800000000

if not NOW then
  local time = redis.call('TIME')
  NOW = time[1] * 1000000 + time[2]
end

local taken = 3
local function take()
  taken = taken + 1
  return ARGV[taken]
end

-- Never `tostring`: it keeps only 14 digits.
local function digits(number) return string.format('%.0f', number) end

-- Milliseconds for PX, within what the server takes.
local function px(expires) return digits(math.min(math.max(math.ceil((expires - NOW) / 1000), 1), 1e14)) end

-- Keys. A valid topic has no ':'; one that nobody knows may have, and must not reach the keys of another.

local ESCAPES = {['%'] = '%25', [':'] = '%3A'}

local function of_topic(kind, topic)
  if string.find(topic, '[%%:]') then topic = string.gsub(topic, '[%%:]', ESCAPES) end
  return PREFIX .. kind .. ':' .. topic
end

-- Tokens: one counter for the whole storage, at least the clock, so that a lost counter hands out no old token again.
-- It is written once, by `finish`.

local last_token
local function next_token()
  last_token = last_token or tonumber(redis.call('GET', PREFIX .. 'token') or 0)
  last_token = math.max(last_token + 1, NOW)
  return last_token
end

-- Counters, added up over the request and written once, by `finish`.

local counted = {}
local function count(topic, name, by)
  local counts = counted[topic]
  if not counts then
    counts = {}
    counted[topic] = counts
  end
  if name then counts[name] = (counts[name] or 0) + by end
end

local function finish(result)
  if last_token then redis.call('SET', PREFIX .. 'token', digits(last_token)) end
  for topic, counts in pairs(counted) do
    local is_known
    for name, by in pairs(counts) do
      -- A counter that was there before lists its topic already.
      is_known = redis.call('HINCRBY', of_topic('c', topic), name, by) > by or is_known
    end
    if not is_known and redis.call('SADD', PREFIX .. 'topics', topic) == 1 then
      redis.call('SET', PREFIX .. 'layout', LAYOUT)
    end
  end
  return result
end
