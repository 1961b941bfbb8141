-- One row for each event. It is held by an owner until it is done or given up.
CREATE TABLE IF NOT EXISTS offload_events (
	event_id   text PRIMARY KEY,
	case_id    text,          -- NULL: the event is a case of its own
	body       bytea,         -- as received, byte for byte; NULL once it is done
	seq        bigint GENERATED ALWAYS AS IDENTITY,   -- the order of the claims
	owner      integer,       -- the replica that handles it; NULL: it is done or was given up
	handed     boolean NOT NULL,                      -- the owner's receiver knows of it
	claimed_at timestamptz NOT NULL DEFAULT now(),
	gave_up_at timestamptz,
	done_at    timestamptz
);

CREATE INDEX IF NOT EXISTS offload_events_owner ON offload_events (owner, seq) WHERE owner IS NOT NULL;
CREATE INDEX IF NOT EXISTS offload_events_to_hand ON offload_events (owner, seq) WHERE owner IS NOT NULL AND NOT handed;
CREATE INDEX IF NOT EXISTS offload_events_case ON offload_events USING hash (case_id) WHERE owner IS NOT NULL;
CREATE INDEX IF NOT EXISTS offload_events_gave_up ON offload_events (gave_up_at) WHERE gave_up_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS offload_events_done ON offload_events (done_at) WHERE done_at IS NOT NULL;

CREATE SEQUENCE IF NOT EXISTS offload_owners AS integer;
