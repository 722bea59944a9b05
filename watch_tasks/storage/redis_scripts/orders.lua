-- Orders: the records of a topic by time, as a sorted set of short lists, so that each costs little more than its index.
--
--   o:<topic>                  the names of its orders
--   i:<topic>:<order>          the fences of its leaves: their lowest place when they were begun
--   z:<topic>:<order>:<fence>  a leaf: places from its fence to the next, as µs after the fence, then the index
--
-- A place is a time and an index: 7 bytes that sort like their number, then the index.
-- Records of one retention are in an order of that name: they end in the order in which they were handled, so it serves
-- to list and to trim. A topic has few retentions; should it have many, the records of the others are in two orders
-- more: `mixed` by the time they were handled, `ends` by the time they end.
-- An index is in an order exactly while its record is in `r:`.

-- Orders of a topic that have a retention each.
local MOST_ORDERS = 8
local function limited(at) return math.min(math.max(at, -SHIFT), 3 * SHIFT) end

-- Those that this script touched: by topic, then by name.
local orders = {}

-- `added` has the time of each index that is to be written; `length` is how long after its place's time each is over, or
-- nil where nothing ends by this order.
local function get_order(topic, name)
  local of = orders[topic]
  if not of then
    of = {}
    orders[topic] = of
  end
  local order = of[name]
  if not order then
    local suffix = ':' .. name
    order = {topic = topic, name = name, fences = of_topic('i', topic) .. suffix,
      leaves = of_topic('z', topic) .. suffix .. ':', added = {}, length = name == 'ends' and 0 or tonumber(name)}
    of[name] = order
  end
  return order
end

local function find_tail(order)
  if order.tail == nil then order.tail = redis.call('ZRANGE', order.fences, -1, -1)[1] or false end
  return order.tail
end

-- The orders of a record, each with its place's time.
local function orders_of(topic, record)
  if not record.mixed then
    local name = record.retention and digits(record.retention) or 'never'
    return {{get_order(topic, name), limited(record.at)}}
  end
  local of = {{get_order(topic, 'mixed'), limited(record.at)}}
  if record.retention then of[2] = {get_order(topic, 'ends'), limited(record.expires)} end
  return of
end

local function pack_leaf(fence, at, index) return struct.pack('>I4', at - time_of(fence)) .. index end

local function unpack_leaf(fence_time, entry) return fence_time + struct.unpack('>I4', entry), string.sub(entry, 5) end

-- What few calls need.
local moves
local function get_moves()
  if moves then return moves end
  moves = {}

  function moves.place_of(at, index) return struct.pack('>I7', at + SHIFT) .. index end

  -- Bytewise, as the server orders fences; Lua's `<` follows the locale.
  function moves.is_less(one, other)
    for place = 1, math.min(#one, #other) do
      local a, b = string.byte(one, place), string.byte(other, place)
      if a ~= b then return a < b end
    end
    return #one < #other
  end

  function moves.list(order)
    redis.call('SADD', of_topic('o', order.topic), order.name)
    order.is_listed = true
  end

  function moves.unlist_if_empty(order)
    if find_tail(order) or next(order.added) then return end
    redis.call('SREM', of_topic('o', order.topic), order.name)
    order.is_listed = false
  end

  function moves.remove_leaf(order, fence)
    redis.call('UNLINK', order.leaves .. fence)
    redis.call('ZREM', order.fences, fence)
    order.tail = nil
  end

  -- Write places, a list of {at, index} in order, as new leaves.
  function moves.begin_leaves(order, places, first, most)
    while places[first] do
      local fence, entries = moves.place_of(places[first][1], places[first][2]), {}
      while places[first] and #entries < most and places[first][1] - time_of(fence) < SPAN do
        entries[#entries + 1] = pack_leaf(fence, places[first][1], places[first][2])
        first = first + 1
      end
      redis.call('ZADD', order.fences, 0, fence)
      redis.call('RPUSH', order.leaves .. fence, unpack(entries))
    end
    order.tail = nil
  end

  -- The leaf that has a place, or would have it.
  function moves.find_leaf(order, at, index)
    return redis.call('ZREVRANGEBYLEX', order.fences, '[' .. moves.place_of(at, index), '-', 'LIMIT', 0, 1)[1]
  end

  -- Add one place that is not behind all others.
  function moves.insert(order, at, index)
    local fence = moves.find_leaf(order, at, index)
    local is_first = not fence
    if is_first then fence = redis.call('ZRANGE', order.fences, 0, 0)[1] end
    local fence_time, leaf = time_of(fence), order.leaves .. fence
    local entries = redis.call('LRANGE', leaf, 0, -1)
    local low, high = 1, #entries + 1
    while low < high do
      local middle = math.floor((low + high) / 2)
      local its_at, its_index = unpack_leaf(fence_time, entries[middle])
      if its_at < at or (its_at == at and moves.is_less(its_index, index)) then low = middle + 1 else high = middle end
    end
    local is_full, is_last = #entries >= LEAF, low > #entries
    if (is_full and (is_first or is_last)) or at - fence_time >= SPAN then
      -- A full leaf stays full where places come in order, upwards or downwards.
      moves.begin_leaves(order, {{at, index}}, 1, 1)
    elseif is_full or is_first then
      local places = {}
      for number, entry in ipairs(entries) do places[number] = {unpack_leaf(fence_time, entry)} end
      table.insert(places, low, {at, index})
      moves.remove_leaf(order, fence)
      moves.begin_leaves(order, places, 1, is_full and math.ceil(#places / 2) or LEAF)
    elseif is_last then
      redis.call('RPUSH', leaf, pack_leaf(fence, at, index))
    else
      redis.call('LINSERT', leaf, 'BEFORE', entries[low], pack_leaf(fence, at, index))
    end
  end

  function moves.leave(order, at, index)
    if order.added[index] then
      -- Perhaps it was all that kept the order listed.
      order.added[index], order.is_left = nil, true
      return
    end
    local fence = moves.find_leaf(order, at, index)
    if not fence then return end
    redis.call('LREM', order.leaves .. fence, 1, pack_leaf(fence, at, index))
    if redis.call('EXISTS', order.leaves .. fence) == 0 then
      moves.remove_leaf(order, fence)
      moves.unlist_if_empty(order)
    end
  end

  return moves
end

-- A record is written over what is stored under its index, and has its place in its orders when `write_orders` is done.
local function join_orders(topic, index, record, stored)
  local of = orders_of(topic, record)
  if not find_tail(of[1][1]) and not of[1][1].is_listed then
    if redis.call('SCARD', of_topic('o', topic)) >= MOST_ORDERS then
      record.mixed = true
      of = orders_of(topic, record)
    end
    for _, pair in ipairs(of) do get_moves().list(pair[1]) end
  end
  if stored then
    local before = orders_of(topic, stored)
    local is_there = #before == #of
    for number, pair in ipairs(before) do
      is_there = is_there and pair[1] == of[number][1] and pair[2] == of[number][2]
    end
    if is_there then return end
    for _, pair in ipairs(before) do get_moves().leave(pair[1], pair[2], index) end
  end
  for _, pair in ipairs(of) do
    pair[1].added[index] = pair[2]
    -- Listed again where the old record was its last.
    if not find_tail(pair[1]) and not pair[1].is_listed then get_moves().list(pair[1]) end
  end
end

-- Add places behind all others: {at, index} in order.
local function push(order, places)
  local tail, kept = find_tail(order), 0
  if tail then
    local tail_time, entries = time_of(tail), {}
    for number, place in ipairs(places) do
      if place[1] - tail_time >= SPAN then break end
      entries[number] = pack_leaf(tail, place[1], place[2])
    end
    kept = #entries
    if kept > 0 then
      -- Asked for its length only by writing: most calls find room.
      local over = math.min(redis.call('RPUSH', order.leaves .. tail, unpack(entries)) - LEAF, kept)
      if over > 0 then
        redis.call('LTRIM', order.leaves .. tail, 0, -over - 1)
        kept = kept - over
      end
    end
  end
  if places[kept + 1] then get_moves().begin_leaves(order, places, kept + 1, LEAF) end
end

-- `sorted` has {topic, index} of each item of the request that may have been added, by time and index.
local function write_orders(sorted)
  local written = {}
  for _, item in ipairs(sorted) do
    for _, order in pairs(orders[item[1]] or {}) do
      local at = order.added[item[2]]
      if at then
        order.added[item[2]] = nil
        if not written[order] then written[order] = {} end
        written[order][#written[order] + 1] = {at, item[2]}
      end
    end
  end
  for order, places in pairs(written) do
    local tail, run, last_at, last_index = find_tail(order), {}, nil, nil
    if tail then last_at, last_index = unpack_leaf(time_of(tail), redis.call('LINDEX', order.leaves .. tail, -1)) end
    for _, place in ipairs(places) do
      local is_next = not last_at or place[1] > last_at
      if place[1] == last_at then
        -- Those of one time come in the order of their indexes, but in the one order that goes by other times.
        is_next = (run[1] and order.name ~= 'ends') or get_moves().is_less(last_index, place[2])
      end
      if is_next then
        run[#run + 1] = place
        last_at, last_index = place[1], place[2]
      else
        if run[1] then push(order, run) end
        run = {}
        get_moves().insert(order, place[1], place[2])
      end
    end
    if run[1] then push(order, run) end
  end
  for _, of in pairs(orders) do
    for _, order in pairs(of) do
      if order.is_listed or order.is_left then get_moves().unlist_if_empty(order) end
    end
  end
end
