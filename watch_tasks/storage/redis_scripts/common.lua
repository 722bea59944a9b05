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

-- Keys. A valid topic has no ':'; one that nobody knows may have, and must not reach the keys of another.

local ESCAPES = {['%'] = '%25', [':'] = '%3A'}

local function of_topic(kind, topic)
  if string.find(topic, '[%%:]') then topic = string.gsub(topic, '[%%:]', ESCAPES) end
  return PREFIX .. kind .. ':' .. topic
end
