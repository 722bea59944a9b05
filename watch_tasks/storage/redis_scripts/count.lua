-- How many records a topic has, without those that expired and were not trimmed yet; logarithmic.

return redis.call('ZCARD', of_topic('z', REQUEST)) - redis.call('ZCOUNT', of_topic('x', REQUEST), '-inf', digits(NOW))
