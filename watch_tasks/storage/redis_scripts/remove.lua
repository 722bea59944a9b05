-- Forget records, and say how many there were; the mark of each id stays for the rest of its retention (protocol §1).

local topic, note, removed = REQUEST[1], take(), 0
for _, index in ipairs(REQUEST[2]) do
  local record, stored = read_record(topic, index)
  get_changes().forget_record(topic, index, stored)
  if record then
    removed = removed + 1
    get_changes().leave_mark(record)
    tell(topic, index, record.expires, {{NOW, 'removed', note}}, false)
  else
    disown(topic, index)
  end
end
return removed
