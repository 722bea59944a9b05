-- Forms that are written in the short way, for a message at its first try, and in the long one.

-- Records: see `records.lua`.
local FIRST, ENDLESS, MIXED, APART, SECONDS, NEAR, FOLDED = 1, 2, 4, 8, 16, 32, 64
-- Bytes of a blob that are stored apart; more would be copied by each claim of a handled index.
local LARGE = 4096

-- Orders: see `orders.lua`.
-- Places in a leaf. The server keeps a short list in one piece of memory.
local LEAF = 128
-- µs from the fence of a leaf to its last place, so that 4 bytes are enough.
local SPAN = 4294967296
-- Added to times, so that those before 1970 sort as well. Orders take what is not of the years 1899 to 2184 for their end.
local SHIFT = 2251799813685248

local function time_of(place) return struct.unpack('>I7', place) - SHIFT end

-- The state of a message at its first try is a text of its own form, put together and compared as a whole; see
-- `states.lua` for that of others. Its index has no story but the two events that are folded into it, and
-- `t:<topic>:<index>` is its id, instead of a list. Whoever wants to know or do more unfolds it first.
--
--   tag        1 byte
--   until      8        end of the lease
--   places     2 and 2  where head and events begin
--   flags      1            whether its handlers have started; whether it holds its index, under once="index"
--   worker     2 and its bytes: how long it is, and what
--   nonce      as long as it is
--   head       token (8), copy (4), index (2 and its bytes), topic (2 and its bytes), retention (8; -1 for ever)
--   events     copy (4), sent at (8), granted at (8), note without its beginning: see `note_of`
local TAG = '\1'
local STARTED, EXCLUSIVE = 1, 2

-- What of the head is the same for many: behind token, copy and index.
local function head_end(topic, retention) return struct.pack('>I2c0d', #topic, topic, retention or -1) end
