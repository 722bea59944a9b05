-- Add a packet to a list: what waits is counted in messages.
--
-- KEYS  the list
-- ARGV  the item
-- Answer: how many items the list has now.

local length = redis.call('LPUSH', KEYS[1], ARGV[1])
count_besides(KEYS[1], besides(ARGV[1]))
return length
