-- Have an item wait until it is due: one in hand (named by its number), or a new one.
--
-- KEYS  what is due later · what this holder has in hand, where it is one of those
-- ARGV  when it is due, ms · ms from now instead ('' : the time is given) · the item: 16 bytes, the length and the key of its list, its bytes · its number
-- Answer: 1, or 0 where it is in hand no longer.

if KEYS[2] and redis.call('HDEL', KEYS[2], ARGV[4]) == 0 then return 0 end
local due = ARGV[2] == '' and tonumber(ARGV[1]) or NOW + tonumber(ARGV[2])
redis.call('ZADD', KEYS[1], digits(due), ARGV[3])
local list = struct.unpack('>Hc0', ARGV[3], 17)
count_besides(list, besides(string.sub(ARGV[3], 19 + #list)))
return 1
