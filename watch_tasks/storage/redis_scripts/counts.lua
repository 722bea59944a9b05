-- Tokens, counters, and times to live.

-- Milliseconds for PX, within what the server takes.
local function px(expires) return digits(math.min(math.max(math.ceil((expires - NOW) / 1000), 1), 1e14)) end

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
