-- Renew a lease, and put back what holders have in hand whose lease is over.
--
-- KEYS  leases of all holders · when somebody last looked
-- ARGV  lease, ms · prefix of the keys of what is in hand · the holder to renew, or ''
-- Answer: whether that holder is still known · how many items were put back · whether there is more to put back.

local HOLDERS, LOOKED = KEYS[1], KEYS[2]
local lease, prefix, own = tonumber(ARGV[1]), ARGV[2], ARGV[3]

-- A write that needs no memory comes first: at its limit the server lets a script that has begun to write go on, and
-- refuses one that begins by adding.
redis.call('ZREM', HOLDERS, '')

local is_known = own ~= '' and redis.call('ZSCORE', HOLDERS, own)
if is_known then redis.call('ZADD', HOLDERS, digits(NOW + lease), own) end

local looked = tonumber(redis.call('GET', LOOKED) or 0)
redis.call('SET', LOOKED, digits(NOW))
if NOW > looked + lease / 2 or NOW < looked - 1000 then
  -- Nobody looked for a while, or the clock was set back: the server stood still, and nobody could renew.
  for _, holder in ipairs(redis.call('ZRANGE', HOLDERS, 0, -1)) do
    redis.call('ZADD', HOLDERS, digits(NOW + lease), holder)
  end
  return {is_known and 1 or 0, 0, 0}
end

local count, is_more = 0, 0
for _, holder in ipairs(redis.call('ZRANGEBYSCORE', HOLDERS, '-inf', digits(NOW), 'LIMIT', 0, 8)) do
  local held = prefix .. holder
  local numbers = redis.call('HKEYS', held)
  if #numbers > 500 then
    is_more = 1
    numbers = {unpack(numbers, 1, 500)}
  else
    redis.call('ZREM', HOLDERS, holder)
  end
  count = count + put_back(held, numbers, 'RPUSH', ' ')
end
return {is_known and 1 or 0, count, is_more}
