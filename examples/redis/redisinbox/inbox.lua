-- All that happens to events. A call is one step: Redis runs nothing beside it, and logs its writes as one transaction.
--
-- KEYS[1] is the prefix of all keys. ARGV holds the name of a step, the owner that calls, and the step's arguments.
--
--   event:<id>   hash: body, as received; case, if it has one; call, which claimed it
--   done:<id>    string: it is done. Expires after the retention
--   case:<case>  hash: the owner of its unfinished events, how many events there are, and how many of those are new
--   owner:<o>    sorted set: the ids of the owner's unfinished events, by the order of the claims
--   new:<o>      sorted set: those of them that the owner's receiver does not know of
--   owners       sorted set: the owners, by the time at which they renewed their leases; 0 for one that has left
--   gave_up      sorted set: the ids of what was given up, by time
--   seq          the number of claims so far

local call, prefix, me = redis.call, KEYS[1], ARGV[2]

-- now returns milliseconds.
local function now()
	local t = call('TIME')
	return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- join makes an owner known, without which nobody would look for the events of a dead one.
local function join()
	call('ZADD', prefix .. 'owners', 'NX', now(), me)
end

-- assign gives an event to the owner of its case, if that has one, and else to me. It returns whether my receiver may
-- have it now: known is false when it does not know of the event, and an event waits for those before it in its case.
local function assign(id, case, known)
	local owner = me
	if case then
		local key = prefix .. 'case:' .. case
		local held = call('HMGET', key, 'owner', 'new')
		owner = held[1] or me
		if not call('ZSCORE', prefix .. 'owners', owner) then -- the counts of the case are wrong, since an event was lost
			owner = me
		end
		known = known and owner == me and (held[2] or '0') == '0'
		call('HSET', key, 'owner', owner)
		call('HINCRBY', key, 'events', 1)
		if not known then
			call('HINCRBY', key, 'new', 1)
		end
	end
	local seq = call('INCR', prefix .. 'seq')
	call('ZADD', prefix .. 'owner:' .. owner, seq, id)
	if not known then
		call('ZADD', prefix .. 'new:' .. owner, seq, id)
	end
	return known
end

-- count changes a number in the hash of an event's case.
local function count(id, field, by)
	local case = call('HGET', prefix .. 'event:' .. id, 'case')
	return case and by ~= 0 and call('HINCRBY', prefix .. 'case:' .. case, field, by)
end

local step = {}

-- renew renews the lease.
function step.renew()
	call('ZADD', prefix .. 'owners', now(), me)
end

-- leave ends the lease.
function step.leave()
	call('ZADD', prefix .. 'owners', 'XX', 0, me)
end

-- expired returns the owners whose leases, of so many milliseconds, are over, each with its time. So are those that were
-- renewed before the clock was set back.
function step.expired(lease)
	local owners, key = {}, prefix .. 'owners'
	for _, range in ipairs({{'-inf', now() - lease}, {now() + lease, '+inf'}}) do
		for _, each in ipairs(call('ZRANGEBYSCORE', key, range[1], range[2], 'WITHSCORES')) do
			owners[#owners + 1] = each
		end
	end
	return owners
end

-- inherit takes over at most so many events of a dead owner, oldest first, if it has not renewed its lease since the
-- time that was seen. While there are more it renews that lease itself, so that nobody else inherits, and returns the
-- time.
function step.inherit(dead, seen, most)
	if call('ZSCORE', prefix .. 'owners', dead) ~= seen then
		return ''
	end
	join()
	local ids = call('ZRANGE', prefix .. 'owner:' .. dead, 0, most - 1, 'WITHSCORES')
	for i = 1, #ids, 2 do
		local id, seq = ids[i], ids[i + 1]
		call('ZREM', prefix .. 'owner:' .. dead, id)
		call('ZADD', prefix .. 'owner:' .. me, seq, id)
		call('ZADD', prefix .. 'new:' .. me, seq, id)
		count(id, 'new', 1 - call('ZREM', prefix .. 'new:' .. dead, id))
		local case = call('HGET', prefix .. 'event:' .. id, 'case')
		if case then
			call('HSET', prefix .. 'case:' .. case, 'owner', me)
		end
	end
	if #ids < 2 * most then
		call('ZREM', prefix .. 'owners', dead)
		return ''
	end
	call('ZADD', prefix .. 'owners', now(), dead)
	return call('ZSCORE', prefix .. 'owners', dead)
end

-- claim stores an event. It returns 1 if it is new, and my receiver may have it now. this is the name of the call: when
-- it is repeated, because the answer was lost, it gets the same answer.
function step.claim(id, case, body, this)
	local key = prefix .. 'event:' .. id
	if call('HGET', key, 'call') == this then
		local known = not call('ZSCORE', prefix .. 'new:' .. me, id)
		return known and call('ZSCORE', prefix .. 'owner:' .. me, id) and 1 or 0
	end
	local held = call('EXISTS', key) == 1 and not call('ZSCORE', prefix .. 'gave_up', id)
	if held or call('EXISTS', prefix .. 'done:' .. id) == 1 then
		return 0
	end
	join()
	case = case ~= '' and case
	local fresh = assign(id, case, true) and 1 or 0
	call('DEL', key) -- if it was given up
	call('ZREM', prefix .. 'gave_up', id)
	-- Last, since an ACL may forbid a command in the midst of a step: then the id is not taken for a duplicate.
	call('HSET', key, 'body', body, 'call', this, unpack(case and { 'case', case } or {}))
	return fresh
end

-- holds returns 1 if the event is mine.
function step.holds(id)
	return call('ZSCORE', prefix .. 'owner:' .. me, id) and 1 or 0
end

-- done ends an event if it is mine: retention is that of its id in milliseconds, or '' when it was given up.
function step.done(id, retention)
	local key = prefix .. 'event:' .. id
	if call('ZREM', prefix .. 'owner:' .. me, id) == 0 then
		return
	end
	count(id, 'new', 0 - call('ZREM', prefix .. 'new:' .. me, id))
	if count(id, 'events', -1) == 0 then
		call('DEL', prefix .. 'case:' .. call('HGET', key, 'case'))
	end
	if retention ~= '' then
		call('DEL', key)
		call('SET', prefix .. 'done:' .. id, '', 'PX', retention)
	else
		call('ZADD', prefix .. 'gave_up', now(), id)
	end
end

-- revive brings back at most so many of the events that were given up that many milliseconds ago, and returns how many.
function step.revive(rest, most)
	local ids = call('ZRANGEBYSCORE', prefix .. 'gave_up', '-inf', now() - rest, 'LIMIT', 0, most)
	for _, id in ipairs(ids) do
		join()
		call('ZREM', prefix .. 'gave_up', id)
		assign(id, call('HGET', prefix .. 'event:' .. id, 'case'), false)
	end
	return #ids
end

-- last returns the number of my newest event.
function step.last()
	local newest = call('ZRANGE', prefix .. 'owner:' .. me, -1, -1, 'WITHSCORES')
	return newest[2] or '0'
end

-- page returns my events after number from, up to number upto: of about a megabyte, the number of the last one that it
-- has looked at, and the number, id, case and body of each. which is 'new', 'owner' for all, or 'known' for all but the new.
function step.page(which, from, upto)
	local key = prefix .. (which == 'new' and 'new:' or 'owner:') .. me
	local ids = call('ZRANGEBYSCORE', key, '(' .. from, upto, 'WITHSCORES', 'LIMIT', 0, 64)
	local page, bytes = { '' }, 0
	for i = 1, #ids, 2 do
		local id = ids[i]
		page[1] = ids[i + 1]
		if which ~= 'known' or not call('ZSCORE', prefix .. 'new:' .. me, id) then
			local event = call('HMGET', prefix .. 'event:' .. id, 'case', 'body')
			local n = #page
			page[n + 1], page[n + 2], page[n + 3], page[n + 4] = page[1], id, event[1] or '', event[2] or ''
			bytes = bytes + #page[n + 4]
			if not event[2] and which ~= 'new' then -- whoever reads this reports it, once
				call('ZREM', key, id)
			end
		end
		if bytes > 1000000 then
			break
		end
	end
	return page
end

-- know notes that my receiver knows of these events, each a number and an id.
function step.know(...)
	local events, key = { ... }, prefix .. 'new:' .. me
	for i = 1, #events, 2 do
		local seq, id = events[i], events[i + 1]
		if call('ZSCORE', key, id) == seq then
			count(id, 'new', 0 - call('ZREM', key, id))
		end
	end
end

return step[ARGV[1]](unpack(ARGV, 3))
