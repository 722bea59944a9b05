-- Records: `r:<topic>` has each under its index, `b:<topic>` the blobs that are too large to be read with every claim.
--
--   flags      1 byte   what follows in which form
--   at         8        when it was handled
--   token      4 or 8   as µs before that, where these are few; or itself
--   first      8        the first token, where it is another
--   retention  4 or 8   as seconds, where these are whole; or µs; nothing where it never ends
--   id, digest 17 or more each, in the client's short form, none of which begins another
--   blob       unless it is in `b:`
--
-- That of a message handled at its first try has its story folded into it. Behind the digest it has instead of the blob:
--
--   events     2 and their bytes: of each event of the commit its kind and its note, as long as a byte and two say
--   blob       2 and its bytes
--   begin      the events of its state, see `forms.lua`

local function parse_record(value)
  local flags, at, place = struct.unpack('>Bd', value)
  local record = {value = value, at = at, expires = NEVER,
    mixed = bit.band(flags, MIXED) > 0, apart = bit.band(flags, APART) > 0,
    folded = bit.band(flags, FOLDED) > 0}
  if bit.band(flags, NEAR) > 0 then
    record.token, place = struct.unpack('>I4', value, place)
    record.token = at - record.token
  else
    record.token, place = struct.unpack('>d', value, place)
  end
  record.first = record.token
  if bit.band(flags, FIRST) > 0 then record.first, place = struct.unpack('>d', value, place) end
  if bit.band(flags, ENDLESS) == 0 then
    if bit.band(flags, SECONDS) > 0 then
      record.retention, place = struct.unpack('>I4', value, place)
      record.retention = record.retention * 1000000
    else
      record.retention, place = struct.unpack('>d', value, place)
    end
    record.expires = at + record.retention
  end
  record.place = place
  return record
end

-- Return the record, and what is stored: that may be over, and not trimmed yet.
local function read_record(topic, index)
  local value = redis.call('HGET', of_topic('r', topic), index)
  if not value then return nil, nil end
  local stored = parse_record(value)
  return stored.expires > NOW and stored or nil, stored
end

local function is_of(record, id) return string.sub(record.value, record.place, record.place + #id - 1) == id end

-- Ids and digests begin with how long they are; those of the usual forms are as bytes.

local function behind_text(value, place)
  if string.byte(value, place) == 0 then return place + 17 end
  return place + 5 + struct.unpack('>I4', value, place + 1)
end

-- Return a text in full, from the client's short form.
local function text_at(value, place, usual_form)
  if string.byte(value, place) ~= 0 then return (struct.unpack('>I4c0', value, place + 1)) end
  return string.format(usual_form, string.byte(value, place + 1, place + 16))
end

local HEX = string.rep('%02x', 16)
local UUID = '%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x'

local function id_of(record) return text_at(record.value, record.place, UUID) end

local function digest_of(record) return text_at(record.value, behind_text(record.value, record.place), HEX) end
