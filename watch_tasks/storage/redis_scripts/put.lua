-- Keep records as they are; 1 for each that is kept. It counts as claimed now: a message claimed before does not replace
-- it (protocol §1).

local NAMES = {'topic', 'index', 'id', 'digest', 'at', 'retention', 'only_newer'}

local function put_one(record, blob)
  local old, at = read_record(record.topic, record.index), micros(record.at)
  if record.only_newer and old and old.at >= at then return 0 end
  local token = next_token()
  local new = {at = at, expires = expiry(record.retention, at), first = token, token = token, id = record.id, digest = record.digest}
  write_record(record.topic, record.index, old, new, blob)
  count(record.topic)
  if new.expires <= NOW then return 0 end
  local state = read_state(record.id)
  if state and state.status ~= 'running' then forget(state) end
  return 1
end

local kept = {}
for number, values in ipairs(REQUEST) do kept[number] = put_one(named(NAMES, values), take()) end
return finish(kept, #kept)
