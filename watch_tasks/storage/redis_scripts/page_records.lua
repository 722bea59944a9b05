-- One page of an order with the records: {now, place of the last, index, record, index, record, …}; `false` instead of
-- that place at the end. Where the page before ended, its last place may be gone or in another leaf by now.

local MOST_BYTES = 4 * 1024 * 1024
local page = {topic = REQUEST[1], name = REQUEST[2], newest_first = REQUEST[3], size = REQUEST[4], since = REQUEST[5]}
local after = #ARGV > 3 and take() or nil
local order = get_order(page.topic, page.name)
-- What is over is not read, however much of it waits to be trimmed.
local since = math.max(page.since or -SHIFT, order.length and NOW - order.length + 1 or -SHIFT)

local function read_leaf(fence)
  local places, fence_time = {}, time_of(fence)
  for number, entry in ipairs(redis.call('LRANGE', order.leaves .. fence, 0, -1)) do
    places[number] = {unpack_leaf(fence_time, entry)}
  end
  return places
end

-- The fence of the leaf to begin with.
local function first_fence()
  local from = after
  if not after then
    if page.newest_first then return find_tail(order) end
    from = get_moves().place_of(limited(since), '')
  end
  local fence = redis.call('ZREVRANGEBYLEX', order.fences, '[' .. from, '-', 'LIMIT', 0, 1)[1]
  if fence or page.newest_first then return fence end
  return redis.call('ZRANGE', order.fences, 0, 0)[1]
end

local function next_fence(fence)
  if page.newest_first then return redis.call('ZREVRANGEBYLEX', order.fences, '(' .. fence, '-', 'LIMIT', 0, 1)[1] end
  return redis.call('ZRANGEBYLEX', order.fences, '(' .. fence, '+', 'LIMIT', 0, 1)[1]
end

local after_at = after and time_of(after)
local after_index = after and string.sub(after, 8)

local function is_behind(at, index)
  if not after then return true end
  if at ~= after_at then return (at < after_at) == page.newest_first end
  if index == after_index then return false end
  return get_moves().is_less(index, after_index) == page.newest_first
end

local indexes, picked, is_end = {}, {}, false
local fence = first_fence()
while fence and #indexes < page.size and not is_end do
  local places = read_leaf(fence)
  local first, final, step = 1, #places, 1
  if page.newest_first then first, final, step = #places, 1, -1 end
  for number = first, final, step do
    local at, index = places[number][1], places[number][2]
    if at < since then
      if page.newest_first then
        is_end = true
        break
      end
    elseif is_behind(at, index) then
      indexes[#indexes + 1], picked[#picked + 1] = index, places[number]
      if #indexes == page.size then break end
    end
  end
  if #indexes < page.size and not is_end then fence = next_fence(fence) end
end
if #indexes == 0 then return {digits(NOW), false} end

local found, last, bytes = {digits(NOW), false}, #indexes, 0
for number, value in ipairs(redis.call('HMGET', of_topic('r', page.topic), unpack(indexes))) do
  if bytes > MOST_BYTES then
    last = number - 1
    break
  end
  if value then
    if parse_record(value).apart then value = value .. redis.call('HGET', of_topic('b', page.topic), indexes[number]) end
    bytes = bytes + #value
    found[#found + 1], found[#found + 2] = indexes[number], value
  end
end
found[2] = get_moves().place_of(picked[last][1], picked[last][2])
return found
