-- What all scripts of a flight share. Times are whole milliseconds of the server's own clock.
--
-- One item in hand is kept as the key of its list and the item's bytes, by a number that only this handing-over has.
-- Blanks at the end of an item count how often it came back: to whoever reads JSON they are nothing. What cannot be an
-- object in JSON is left as it is.

local time = redis.call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)

-- Never `tostring`: it keeps only 14 digits.
local function digits(number) return string.format('%.0f', number) end

-- How many messages an item holds besides its first: a packet's header says how many it has in all. More than five
-- digits are no such number, and might be more than the server can count to.
local function besides(item)
  local at = string.find(item, '"watch._bulk"', 1, true)
  local count = at and string.match(item, '"messages": ?(%d%d?%d?%d?%d?)%D', at) or '1'
  return math.max(tonumber(count), 1) - 1
end

-- Keep count of what packets add to the number of items in a queue, those that are not due yet included. Items that
-- others than these scripts bring or take are not counted: the count begins anew when the queue is empty.
local function count_besides(list, number)
  if number == 0 then return end
  local key = string.gsub(list, '\6\22%d+$', '') .. '\6\22besides'
  if redis.call('INCRBY', key, digits(number)) <= 0 then redis.call('DEL', key) end
end

-- Put items back into their lists: at the head, where the next is taken, oldest first; or at the tail.
local function put_back(held, numbers, at, mark)
  table.sort(numbers, function(one, other) return tonumber(one) > tonumber(other) end)
  local count = 0
  for _, number in ipairs(numbers) do
    local kept = redis.call('HGET', held, number)
    -- Removed first: a server at its memory limit refuses to add, but not once a script has begun to write.
    if kept and redis.call('HDEL', held, number) == 1 then
      local list = struct.unpack('>Hc0', kept)
      local item = string.sub(kept, 3 + #list)
      if string.find(item, '} *$') then item = item .. mark end
      redis.call(at, list, item)
      count_besides(list, besides(item))
      count = count + 1
    end
  end
  return count
end
