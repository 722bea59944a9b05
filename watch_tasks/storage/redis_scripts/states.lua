-- States: what is known of an unfinished message, as one MessagePack of its fields in this order. That of a message at
-- its first try is in a short form (`forms.lua`), until somebody reads it here. `copy` is the newest known, `carried` the
-- newest that a delivery brought: `copy` may be one that was never published. Times and tokens that are not known are 0,
-- texts and flags false.

local FIELDS = {
  'copy', 'carried', 'status', 'token', 'first', 'worker', 'nonce', 'until', 'started', 'exclusive', 'crashes', 'progress',
  'topic', 'index', 'expires', 'lettered',
}

local function new_state(id, status, copy)
  return {
    id = id, copy = copy, carried = 0, status = status, token = 0, first = 0, worker = false, nonce = false, ['until'] = 0,
    started = false, exclusive = false, crashes = 0, progress = false, topic = false, index = false, expires = 0,
    lettered = false,
  }
end

local function save(state)
  local value = cmsgpack.pack({
    state.copy, state.carried, state.status, state.token, state.first, state.worker, state.nonce, state['until'],
    state.started, state.exclusive, state.crashes, state.progress, state.topic, state.index, state.expires, state.lettered,
  })
  if state.expires > 0 then
    redis.call('SET', PREFIX .. 's:' .. state.id, value, 'PX', px(state.expires))
  else
    redis.call('SET', PREFIX .. 's:' .. state.id, value)
  end
end

-- Return a state that is in the short form, and write it in the long one.
function unfold_state(id, value)
  local state, head, behind = new_state(id, 'running', 0), nil, nil
  state['until'], head = struct.unpack('>dI2', value, 2)
  local flags = string.byte(value, 14)
  state.started, state.exclusive = bit.band(flags, STARTED) > 0, bit.band(flags, EXCLUSIVE) > 0
  state.worker, behind = struct.unpack('>I2c0', value, 15)
  state.nonce = string.sub(value, behind, head - 1)
  state.token, state.copy, state.index, state.topic = struct.unpack('>dI4I2c0I2c0', value, head)
  state.first, state.carried = state.token, state.copy
  save(state)
  get_folded().unfold_state(id, value, state.topic, state.index)
  return state
end

local function parse_state(id, value)
  if not value then return nil end
  if string.sub(value, 1, 1) == TAG then return unfold_state(id, value) end
  local state = {id = id}
  for number, field in ipairs(cmsgpack.unpack(value)) do state[FIELDS[number]] = field end
  if state.expires > 0 and state.expires <= NOW then
    redis.call('DEL', PREFIX .. 's:' .. id)
    return nil
  end
  return state
end

-- Marks: an id is done, where no record says so. Returns its token.
local function parse_mark(value)
  if not value then return nil end
  local token, expires = struct.unpack('>dd', value)
  return expires > NOW and token or nil
end

-- An expired lease that nobody took over still counts; under once="index", so does only who holds the index.
local function is_held(state)
  if state.status ~= 'running' then return false end
  return not state.exclusive or redis.call('GET', of_topic('h', state.topic) .. ':' .. state.index) == state.id
end

-- What few calls need.
local states
local function get_states()
  if states then return states end
  states = {}

  function states.read_state(id) return parse_state(id, redis.call('GET', PREFIX .. 's:' .. id)) end

  function states.owns(state, topic, index)
    return state and not state.is_gone and state.expires == 0 and state.topic == topic and state.index == index
  end

  function states.give_up(state)
    if not state.exclusive then return end
    local key = of_topic('h', state.topic) .. ':' .. state.index
    if redis.call('GET', key) == state.id then redis.call('DEL', key) end
  end

  -- Dead letters: `l:` has those of a topic by time, `letters` all. Whatever has a letter has a state that says so.
  function states.drop_letter(id)
    local key = PREFIX .. 'd:' .. id
    local head = redis.call('GETRANGE', key, 0, 511)
    if head == '' then return false end
    if struct.unpack('>I4', head, 9) > 499 then head = redis.call('GET', key) end
    redis.call('DEL', key)
    redis.call('ZREM', PREFIX .. 'letters', id)
    redis.call('ZREM', of_topic('l', (struct.unpack('>I4c0', head, 9))), id)
    return true
  end

  -- It is done for good: nothing unfinished is known of it any more, and it is not listed as dead. The caller says which
  -- story a record keeps.
  function states.forget(state, topic, index)
    if not state then return end
    if state.lettered then states.drop_letter(state.id) end
    states.give_up(state)
    redis.call('DEL', PREFIX .. 's:' .. state.id)
    state.is_gone = true
    if state.topic ~= topic or state.index ~= index then disown(state.topic, state.index) end
  end

  return states
end
