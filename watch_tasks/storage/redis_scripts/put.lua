-- Keep records as they are; 1 for each that is kept. It counts as claimed now: a message claimed before does not replace
-- it (protocol §1).

local function put_one(topic, index, id, at, retention, is_only_newer, id_size, digest_size)
  local value = take()
  local old, stored = read_record(topic, index)
  if is_only_newer and old and old.at >= at then return 0 end
  local token, blob = next_token(), id_size + digest_size
  local new = {at = at, retention = retention, first = token, token = token, id = string.sub(value, 1, id_size),
    digest = string.sub(value, id_size + 1, blob)}
  count(topic)
  open_story(topic, index)
  if not write_record(topic, index, old, stored, new, string.sub(value, blob + 1)) then return 0 end
  local state = get_states().read_state(id)
  if state and state.status ~= 'running' then get_states().forget(state, topic, index) end
  return 1
end

local kept, last, puts, sorted = {}, {}, REQUEST[1], {}
for number, values in ipairs(puts) do
  kept[number] = put_one(unpack(values, 1, 8))
  if kept[number] == 1 then last[of_topic('r', values[1]) .. ':' .. values[2]] = number end
end
for _, place in ipairs(REQUEST[2]) do
  local values = puts[place]
  -- An index that is put twice has its place by the last time only.
  if last[of_topic('r', values[1]) .. ':' .. values[2]] == place then sorted[#sorted + 1] = values end
end
write_orders(sorted)
trim_orders(2 * #puts)
return finish(kept)
