-- Stories: the newest events of an index. Each event says until when the story is kept as far as is known by then.
--
-- A story ends with the record of its index, when that is trimmed, and has no time to live of its own as long as there
-- is a record or an unfinished message: a million of them would end in one burst of the server's. Where there is
-- neither (nobody *owns* it), the server ends it; its last event is then flagged.

local STORY_LENGTH = 200
-- Added to the length of an event's kind.
local FLAG = 128

-- `events` has {at, kind, note} of each.
local function tell(topic, index, expires, events, is_owned)
  if #events == 0 then return end
  local key = of_topic('t', topic) .. ':' .. index
  local last, was_timed = redis.call('LINDEX', key, -1), false
  if last then
    local _, ends, size = struct.unpack('>ddB', last)
    if ends <= NOW then
      redis.call('UNLINK', key)
    else
      expires, was_timed = math.max(expires, ends), size >= FLAG
    end
  end
  local is_timed = not is_owned and expires < NEVER
  for number, told in ipairs(events) do
    local flag = is_timed and number == #events and FLAG or 0
    events[number] = struct.pack('>ddBc0', told[1], expires, #told[2] + flag, told[2]) .. told[3]
  end
  if redis.call('RPUSH', key, unpack(events)) > STORY_LENGTH then redis.call('LTRIM', key, -STORY_LENGTH, -1) end
  if is_timed then
    redis.call('PEXPIRE', key, px(expires))
  elseif was_timed then
    redis.call('PERSIST', key)
  end
end

-- A record or an unfinished message of the index is gone. Where none is left, the server is to end the story when its
-- time is over. A record that is over and not trimmed yet is one: its story ends with it.
local function disown(topic, index, is_forgotten)
  if not index or (not is_forgotten and redis.call('HEXISTS', of_topic('r', topic), index) == 1) then return end
  local key = of_topic('t', topic) .. ':' .. index
  local last = redis.call('LINDEX', key, -1)
  if not last then return end
  local _, ends, size = struct.unpack('>ddB', last)
  if ends <= NOW then
    redis.call('UNLINK', key)
  elseif ends < NEVER and size < FLAG then
    redis.call('LSET', key, -1, string.sub(last, 1, 16) .. string.char(size + FLAG) .. string.sub(last, 18))
    redis.call('PEXPIRE', key, px(ends))
  end
end
