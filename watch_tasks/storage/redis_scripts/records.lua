-- Records: `r:<topic>` has each under its index, `b:<topic>` the blobs that are too large to be read with every claim.
--
--   flags      1 byte   what follows in which form
--   at         8        when it was handled
--   token      4 or 8   as µs before that, where these are few; or itself
--   first      8        the first token, where it is another
--   retention  4 or 8   as seconds, where these are whole; or µs; nothing where it never ends
--   id, digest 17 or more each, in the client's short form, none of which begins another
--   blob       unless it is in `b:`

local FIRST, ENDLESS, MIXED, APART, SECONDS, NEAR = 1, 2, 4, 8, 16, 32
-- Bytes of a blob that are stored apart; more would be copied by each claim of a handled index.
local LARGE = 4096

local function parse_record(value)
  local flags, at, place = struct.unpack('>Bd', value)
  local record = {value = value, at = at, expires = NEVER, mixed = bit.band(flags, MIXED) > 0, apart = bit.band(flags, APART) > 0}
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
