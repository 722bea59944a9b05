-- The events of an index, oldest first, as they are in a list; nothing where they are over.

local topic, index = REQUEST[1], REQUEST[2]
local key = story_key(topic, index)
local kind = redis.call('TYPE', key).ok
local listed = kind == 'list' and redis.call('LRANGE', key, 0, -1) or {}
local events, ends = {}, 0
if kind == 'string' then
  local id = redis.call('GET', key)
  local state = redis.call('GET', PREFIX .. 's:' .. id)
  -- Without it, somebody removed it by hand.
  if state and string.sub(state, 1, 1) == TAG then events, ends = get_folded().of_state(id, state) end
else
  local _, stored = read_record(topic, index)
  if listed[1] then ends = select(2, struct.unpack('>dd', listed[#listed])) end
  if stored and stored.folded and (not listed[1] or continues(listed[1])) then
    events, ends = get_folded().of_record(stored), math.max(ends, stored.expires)
  end
end
if ends <= NOW then return {} end
local told = {}
for number, event in ipairs(events) do told[number] = pack_event(event, ends) end
for _, event in ipairs(listed) do told[#told + 1] = event end
while #told > STORY_LENGTH do table.remove(told, 1) end
return told
