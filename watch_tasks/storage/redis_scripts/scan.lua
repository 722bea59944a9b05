-- What a walk through the records of a topic begins with: {now, last token, name of an order, µs of its last, …}.

local found = {digits(NOW), digits(math.max(NOW, tonumber(redis.call('GET', PREFIX .. 'token') or 0)))}
for _, name in ipairs(redis.call('SMEMBERS', of_topic('o', REQUEST))) do
  local order = get_order(REQUEST, name)
  local tail = name ~= 'ends' and find_tail(order)
  if tail then
    local at = unpack_leaf(time_of(tail), redis.call('LINDEX', order.leaves .. tail, -1))
    for _, part in ipairs({name, digits(at)}) do found[#found + 1] = part end
  end
end
return found
