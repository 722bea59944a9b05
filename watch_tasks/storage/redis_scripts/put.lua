-- Keep one record as it is. It counts as claimed now: a message claimed before does not replace it (protocol §1).

local record = named({'topic', 'index', 'id', 'digest', 'at', 'retention'}, REQUEST)
local old, token, at = read_record(record.topic, record.index), next_token(), micros(record.at)
local new = {at = at, expires = expiry(record.retention, at), first = token, token = token, id = record.id, digest = record.digest}
write_record(record.topic, record.index, old, new, take())
count(record.topic)
local state = read_state(record.id)
if state and state.status ~= 'running' and new.expires > NOW then forget(state) end
return finish(1, 1)
