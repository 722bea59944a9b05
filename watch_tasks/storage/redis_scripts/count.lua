-- How many records a topic has, without those that are over and were not trimmed yet. Exact while these fill few leaves;
-- of more the first are counted, and the others taken to be alike.

local MOST_LEAVES = 32

local function count_over(order)
  if not order.length then return 0 end
  -- All leaves but the last of these are over entirely; in that, some places may be.
  local bound = NOW - order.length
  local leaves = redis.call('ZLEXCOUNT', order.fences, '-', '(' .. get_moves().place_of(limited(bound + 1), ''))
  if leaves == 0 then return 0 end
  local counted, first = 0, math.min(leaves - 1, MOST_LEAVES)
  for _, fence in ipairs(first > 0 and redis.call('ZRANGE', order.fences, 0, first - 1) or {}) do
    counted = counted + redis.call('LLEN', order.leaves .. fence)
  end
  if leaves - 1 > first then counted = math.floor(counted * (leaves - 1) / first) end
  local fence = redis.call('ZRANGE', order.fences, leaves - 1, leaves - 1)[1]
  local fence_time = time_of(fence)
  for _, entry in ipairs(redis.call('LRANGE', order.leaves .. fence, 0, -1)) do
    if unpack_leaf(fence_time, entry) > bound then break end
    counted = counted + 1
  end
  return counted
end

local length = redis.call('HLEN', of_topic('r', REQUEST))
for _, name in ipairs(redis.call('SMEMBERS', of_topic('o', REQUEST))) do
  length = length - count_over(get_order(REQUEST, name))
end
return math.max(length, 0)
