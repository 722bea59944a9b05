-- Extend the leases that a worker holds; 1 for each id it holds, 0 for the others, which are left alone (protocol §4).

local worker, ids, lease = REQUEST[1], REQUEST[2], REQUEST[3]
local held, keys, first, ending = {}, {}, {}, struct.pack('>d', NOW + lease)
for number, id in ipairs(ids) do keys[number] = PREFIX .. 's:' .. id end
for number, value in ipairs(redis.call('MGET', unpack(keys))) do
  held[number] = 0
  if value and string.sub(value, 1, 1) == TAG then
    if struct.unpack('>I2c0', value, 15) == worker then
      first[#first + 1], first[#first + 2] = keys[number], TAG .. ending .. string.sub(value, 10)
      held[number] = 1
    end
  else
    local state = parse_state(ids[number], value)
    if state and state.worker == worker and is_held(state) then
      state['until'] = NOW + lease
      save(state)
      held[number] = 1
    end
  end
end
if first[1] then redis.call('MSET', unpack(first)) end
return held
