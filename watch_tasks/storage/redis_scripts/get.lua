-- One record, over or not: {now, header, blob where that is apart}.

local topic, index = REQUEST[1], REQUEST[2]
local value = redis.call('HGET', of_topic('r', topic), index)
if not value then return {digits(NOW)} end
return {digits(NOW), value, parse_record(value).apart and redis.call('HGET', of_topic('b', topic), index)}
