-- One page of a time-ordered set with the values of its members: {now, member, score, value, member, …}.
-- Members of equal time are ordered by name, so (score, member) says exactly where the page before ended.

local MOST_BYTES = 4 * 1024 * 1024
local page = {
  members = REQUEST[1], values = REQUEST[2], newest_first = REQUEST[3], size = REQUEST[4], since = REQUEST[5],
  last = REQUEST[6],
}
local after = #ARGV > 3 and take() or nil
local key = PREFIX .. page.members

local function pick(from, to)
  return redis.call(page.newest_first and 'ZREVRANGE' or 'ZRANGE', key, from, to, 'WITHSCORES')
end

-- Bytewise, as the server orders members; Lua's `<` follows the locale.
local function is_less(one, other)
  for place = 1, math.min(#one, #other) do
    local a, b = one:byte(place), other:byte(place)
    if a ~= b then return a < b end
  end
  return #one < #other
end

-- Rank of the first member of this page.
local function start()
  local rank = page.newest_first and 'ZREVRANK' or 'ZRANK'
  if not after then
    if page.newest_first or not page.since then return 0 end
    return redis.call('ZCOUNT', key, '-inf', '(' .. digits(page.since))
  end
  if tonumber(redis.call('ZSCORE', key, after)) == page.last then return redis.call(rank, key, after) + 1 end
  -- Where the last page ended was removed or handled again: count what lies before its time, then skip its ties.
  local bound = '(' .. digits(page.last)
  local place = page.newest_first and redis.call('ZCOUNT', key, bound, '+inf') or redis.call('ZCOUNT', key, '-inf', bound)
  while true do
    local next = pick(place, place)
    if not next[1] or tonumber(next[2]) ~= page.last then return place end
    if page.newest_first and is_less(next[1], after) then return place end
    if not page.newest_first and is_less(after, next[1]) then return place end
    place = place + 1
  end
end

local found, bytes = {digits(NOW)}, 0
local first = start()
local picked = pick(first, first + page.size - 1)
for place = 1, #picked, 2 do
  if bytes > MOST_BYTES or (page.since and tonumber(picked[place + 1]) < page.since) then break end
  local value = redis.call('GET', PREFIX .. page.values .. picked[place])
  bytes = bytes + (value and #value or 0)
  for _, part in ipairs({picked[place], picked[place + 1], value}) do found[#found + 1] = part end
end
return found
