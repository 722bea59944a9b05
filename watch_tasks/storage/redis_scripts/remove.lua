-- Forget records, and say how many there were; the mark of each id stays for the rest of its retention (protocol §1).

local request = named({'topic', 'indexes'}, REQUEST)
local note, removed = take(), 0
for _, index in ipairs(request.indexes) do
  local record = read_record(request.topic, index)
  if record then
    removed = removed + 1
    forget_record(request.topic, index)
    write_mark(record.id, record.token, record.expires)
    local retention = record.expires < NEVER and (record.expires - NOW) / 1000000 or nil
    tell(request.topic, index, retention, {event(NOW, 'removed', note, record.expires)})
  end
end
return removed
