-- Forget records of these topics that are over, at most so many; return how many there were, or -1 where somebody else
-- tended this storage less than `pause` µs ago. Nobody waits for a number of records that is worth noticing.

local topics, most, pause = REQUEST[1], REQUEST[2], REQUEST[3]
if pause then
  local before = tonumber(redis.call('GET', PREFIX .. 'tended') or -1)
  -- A clock that was set back must not stop it.
  if before >= 0 and NOW >= before and NOW < before + pause then return -1 end
  redis.call('SET', PREFIX .. 'tended', digits(NOW))
end
local trimmed = 0
for _, topic in ipairs(topics) do
  for _, name in ipairs(redis.call('SMEMBERS', of_topic('o', topic))) do
    if trimmed >= most then return trimmed end
    trimmed = trimmed + trim_order(get_order(topic, name), most - trimmed)
  end
end
return trimmed
