-- Forget what is settled, bring what is due, and hand over what waits, in one step.
--
-- KEYS  leases of all holders · what this holder has in hand · the lists, the most urgent first · what is due later
-- ARGV  holder · its lease, ms · room · number of the first item · bytes at most · how many lists · numbers to forget …
-- Answer: now, when the next is due (-1: nothing), then for each item the place of its list and its bytes.

local HOLDERS, HELD = KEYS[1], KEYS[2]
local holder, lease, room, first, most, lists =
  ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

for at = 7, #ARGV, 1000 do redis.call('HDEL', HELD, unpack(ARGV, at, math.min(at + 999, #ARGV))) end

local due, empty = -1, {}
for place = 3 + lists, #KEYS do
  local later = KEYS[place]
  if room > 0 then
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', later, '-inf', digits(NOW), 'LIMIT', 0, 100)) do
      redis.call('ZREM', later, member)
      local list = struct.unpack('>Hc0', member, 17)
      redis.call('RPUSH', list, string.sub(member, 19 + #list))
    end
  end
  local soonest = redis.call('ZRANGE', later, 0, 0, 'WITHSCORES')[2]
  if not soonest then empty[#empty + 1] = later end
  if soonest and (due < 0 or tonumber(soonest) < due) then due = tonumber(soonest) end
end

local answer, count, bytes = {NOW, due}, 0, 0
for place = 3, 2 + lists do
  while count < room and bytes < most do
    -- Taken first: see `put_back`.
    local item = redis.call('RPOP', KEYS[place])
    if not item then break end
    redis.call('HSET', HELD, digits(first + count), struct.pack('>Hc0', #KEYS[place], KEYS[place]) .. item)
    count_besides(KEYS[place], -besides(item))
    count, bytes = count + 1, bytes + #item
    answer[#answer + 1], answer[#answer + 2] = place - 3, item
  end
end

if count > 0 then
  -- Renewal is not this script's: a lease that has just begun would make its holder's death known later.
  local ends = tonumber(redis.call('ZSCORE', HOLDERS, holder) or 0)
  if ends < NOW + lease / 2 then redis.call('ZADD', HOLDERS, digits(NOW + lease), holder) end
end
if count < room then
  -- Read, so that the server tells this connection when something is added.
  for place = 3, 2 + lists do redis.call('EXISTS', KEYS[place]) end
  -- Where nothing waits at all, a count that is left over is wrong.
  if bytes < most then
    for _, later in ipairs(empty) do redis.call('DEL', (string.gsub(later, 'later$', 'besides'))) end
  end
end
return answer
