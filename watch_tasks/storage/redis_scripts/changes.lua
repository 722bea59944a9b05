-- What changes records: written over others, forgotten, and trimmed when their time is over.

-- What few calls need.
local changes
local function get_changes()
  if changes then return changes end
  changes = {}

  -- An id is done, where no record says so.
  function changes.write_mark(id, token, expires)
    if expires <= NOW then return end
    local key, mark = PREFIX .. 'm:' .. id, struct.pack('>dd', token, expires)
    if expires == NEVER then redis.call('SET', key, mark) else redis.call('SET', key, mark, 'PX', px(expires)) end
  end

  -- The record is replaced or removed.
  function changes.leave_mark(record) changes.write_mark(id_of(record), record.token, record.expires) end

  function changes.forget_record(topic, index, stored)
    if not stored then return end
    get_folded().unfold_record(topic, index, stored)
    redis.call('HDEL', of_topic('r', topic), index)
    if stored.apart then redis.call('HDEL', of_topic('b', topic), index) end
    for _, pair in ipairs(orders_of(topic, stored)) do get_moves().leave(pair[1], pair[2], index) end
  end

  -- The records of these indexes are over, and about to be forgotten.
  function changes.end_stories(topic, indexes)
    local keys, ended = {}, {}
    for number, index in ipairs(indexes) do keys[number] = story_key(topic, index) end
    if redis.call('EXISTS', unpack(keys)) == 0 then return end
    for number, index in ipairs(indexes) do
      local key = keys[number]
      local last = redis.call('TYPE', key).ok == 'list' and redis.call('LINDEX', key, -1)
      if last and select(2, struct.unpack('>dd', last)) <= NOW then
        ended[#ended + 1] = key
      elseif last then
        local _, stored = read_record(topic, index)
        if stored then get_folded().unfold_record(topic, index, stored) end
        disown(topic, index, true)
      end
    end
    if ended[1] then redis.call('UNLINK', unpack(ended)) end
  end

  -- Forget up to `most` records of the first leaf that are over, and end their stories; return how many there were.
  function changes.trim(order, fence, most)
    local topic, leaf, fence_time, over = order.topic, order.leaves .. fence, time_of(fence), {}
    for number, entry in ipairs(redis.call('LRANGE', leaf, 0, most - 1)) do
      local at, index = unpack_leaf(fence_time, entry)
      if at + order.length > NOW then break end
      over[number] = index
    end
    if #over == 0 then return 0 end
    if order.name == 'ends' then
      for number, value in ipairs(redis.call('HMGET', of_topic('r', topic), unpack(over))) do
        if value then get_moves().leave(get_order(topic, 'mixed'), limited(parse_record(value).at), over[number]) end
      end
    end
    redis.call('LTRIM', leaf, #over, -1)
    if redis.call('EXISTS', leaf) == 0 then
      get_moves().remove_leaf(order, fence)
      get_moves().unlist_if_empty(order)
    end
    changes.end_stories(topic, over)
    redis.call('HDEL', of_topic('r', topic), unpack(over))
    if redis.call('EXISTS', of_topic('b', topic)) == 1 then redis.call('HDEL', of_topic('b', topic), unpack(over)) end
    return #over
  end

  return changes
end

-- One record per index: what it replaces leaves the mark of its id. Returns whether it is kept. `new` has at, retention
-- or nil, first, token, id, digest; it becomes as small as may be, because there may be ten million. The caller tells of
-- it, or opens the story.
local function write_record(topic, index, old, stored, new, blob)
  if old and not is_of(old, new.id) then get_changes().leave_mark(old) end
  if new.retention and new.at + new.retention <= NOW then
    get_changes().forget_record(topic, index, stored)
    disown(topic, index, true)
    return false
  end
  new.expires = new.at + (new.retention or NEVER)
  if stored then get_folded().unfold_record(topic, index, stored) end
  join_orders(topic, index, new, stored)
  local flags, parts, since = new.mixed and MIXED or 0, {}, new.at - new.token
  if since >= 0 and since < 4294967296 then
    flags, parts[1] = flags + NEAR, struct.pack('>I4', since)
  else
    parts[1] = struct.pack('>d', new.token)
  end
  if new.first ~= new.token then flags, parts[#parts + 1] = flags + FIRST, struct.pack('>d', new.first) end
  if not new.retention then
    flags = flags + ENDLESS
  elseif new.retention % 1000000 == 0 and new.retention < 4294967296000000 then
    flags, parts[#parts + 1] = flags + SECONDS, struct.pack('>I4', new.retention / 1000000)
  else
    parts[#parts + 1] = struct.pack('>d', new.retention)
  end
  parts[#parts + 1] = new.id
  parts[#parts + 1] = new.digest
  if #blob > LARGE then
    redis.call('HSET', of_topic('b', topic), index, blob)
    flags = flags + APART
  else
    if stored and stored.apart then redis.call('HDEL', of_topic('b', topic), index) end
    parts[#parts + 1] = blob
  end
  redis.call('HSET', of_topic('r', topic), index, struct.pack('>Bd', flags, new.at) .. table.concat(parts))
  return true
end

-- Forget up to `most` records of an order that are over, and return how many there were.
local function trim_order(order, most)
  local trimmed = 0
  while order.length and trimmed < most do
    local fence = redis.call('ZRANGE', order.fences, 0, 0)[1]
    if not fence or time_of(fence) + order.length > NOW then break end
    local count = get_changes().trim(order, fence, most - trimmed)
    if count == 0 then break end
    trimmed = trimmed + count
  end
  return trimmed
end

-- Trim the orders that were touched: more than was written to them, so that they do not grow.
local function trim_orders(most)
  for _, of in pairs(orders) do
    for _, order in pairs(of) do trim_order(order, most) end
  end
end
