package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"offloadhook"
)

// reconciler delivers the events of cases as the API tells them.
type reconciler struct {
	api     *api
	deliver func(ctx context.Context, body []byte) (fresh bool, err error) // Receiver.Deliver
	minAge  time.Duration
	maxAge  time.Duration // less than the store remembers ids: what it has forgotten would be new to it
	log     *slog.Logger
	failing sync.Map // the event ids that observe was told of
}

// tally says how many cases went which way.
type tally struct {
	repaired int // their event had not arrived
	known    int // their event had arrived, or a callback is failing on it
	young    int // updated less than minAge ago
	old      int // updated more than maxAge ago
	none     int // neither ended nor waiting for input
	failed   int
}

// observe has to be called from the observer of a receiver that has an Inbox. So run knows on which events a callback
// fails, and leaves them alone: the Inbox has them as they came. To deliver one that was given up would put what the API
// tells in its place, which is less. It does not know what another replica has given up. Without an Inbox do not call it:
// nobody keeps such an event then, and run is to deliver it again.
func (r *reconciler) observe(o offloadhook.Observation) {
	switch o.Outcome {
	case offloadhook.Retrying, offloadhook.GaveUp, offloadhook.Unfinished:
		r.failing.Store(o.Envelope.EventID, true)
	case offloadhook.Handled:
		r.failing.Delete(o.Envelope.EventID)
	}
}

// run makes one round. A case that fails does not stop it; the end of ctx does, and so do a refused key and a receiver
// that is closed.
func (r *reconciler) run(ctx context.Context, ids []string) (t tally, err error) {
	for _, id := range ids {
		c, err := r.api.get(ctx, id)
		if ctx.Err() != nil || errors.Is(err, errKey) {
			return t, cmp.Or(ctx.Err(), err)
		}
		var eventID string
		var body []byte
		if err == nil {
			eventID, body, err = event(c)
		}
		_, failing := r.failing.Load(eventID)
		fresh := false
		switch {
		case err != nil || failing:
		case body == nil:
			t.none++
			continue
		case time.Since(c.UpdatedAt.Time()) < r.minAge:
			t.young++
			continue
		case time.Since(c.UpdatedAt.Time()) > r.maxAge:
			t.old++
			continue
		default:
			fresh, err = r.deliver(ctx, body)
		}
		switch {
		case errors.Is(err, offloadhook.ErrClosed):
			return t, err
		case err != nil:
			t.failed++
			r.log.Error("failed", "case", id, "error", err)
		case fresh:
			t.repaired++
			r.log.Info("repaired", "case", id, "status", c.Status, "updated", c.UpdatedAt.Time())
		default:
			t.known++
		}
	}
	return t, nil
}

// state is what GET /cases/{id} tells of a case.
type state struct {
	CaseID    string             `json:"caseId"`
	Status    offloadhook.Status `json:"status"`
	UpdatedAt offloadhook.Millis `json:"updatedAt"`
	fields    map[string]json.RawMessage
}

func (c *state) UnmarshalJSON(text []byte) error {
	type known state
	return errors.Join(json.Unmarshal(text, (*known)(c)), json.Unmarshal(text, &c.fields))
}

// event returns the webhook for the present state of c, a nil body if that is a state without one. It copies the fields
// as they are, whatever their types: should one drift, the event arrives all the same, as it does from Offload.
func event(c *state) (id string, body []byte, err error) {
	data := make(map[string]json.RawMessage)
	take := func(name string, value json.RawMessage) {
		if value != nil && string(value) != "null" {
			data[name] = value
		}
	}
	common := []string{
		"caseId", "clientReferenceId", "status", "channel", "attemptCount", "attachments", "resultStatus",
	}
	for _, name := range common {
		take(name, c.fields[name])
	}
	var t offloadhook.EventType
	switch c.Status {
	case offloadhook.StatusCompleted:
		t = offloadhook.TypeCaseCompleted
		take("result", c.fields["result"])
	case offloadhook.StatusFailed:
		t = offloadhook.TypeCaseFailed
	case offloadhook.StatusInputNeeded:
		t = offloadhook.TypeCaseInputNeeded
		var input map[string]json.RawMessage
		if err := json.Unmarshal(c.fields["inputRequest"], &input); err != nil || input == nil {
			return "", nil, errors.New("it waits for input, but the API shows no inputRequest")
		}
		take("inputRequest", input["question"])
		take("inputRequestId", input["id"])
		take("inputRequestStatus", input["status"])
		take("inputRequestedAt", input["requestedAt"])
	default:
		return "", nil, nil
	}
	if c.UpdatedAt == 0 {
		return "", nil, errors.New("the API shows no updatedAt, so the event_id is unknown")
	}
	env := offloadhook.Envelope{
		EventID:   offloadhook.EventID(c.CaseID, t, c.UpdatedAt),
		EventType: t,
		Timestamp: c.UpdatedAt,
	}
	if env.Data, err = json.Marshal(data); err == nil {
		body, err = json.Marshal(env)
	}
	return env.EventID, body, err
}

// api asks Offload's API. It is not safe for concurrent use.
type api struct {
	base   string
	key    string
	client *http.Client
	pause  time.Duration // between two requests
	next   time.Time     // of the next request at the earliest
	away   bool          // since all attempts for a case failed; until one succeeds each case gets one
}

func newAPI(base, key string, rate float64, transport http.RoundTripper) *api {
	return &api{
		base: strings.TrimSuffix(base, "/"),
		key:  key,
		client: &http.Client{
			Timeout:   30 * time.Second,
			Transport: transport,
			// net/http would carry the key along to wherever a redirect leads.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		pause: time.Duration(min(1/rate, 1e9) * float64(time.Second)), // a Duration holds nine times that
	}
}

var errKey = errors.New("the API refuses the key")

const (
	attempts  = 6
	firstRest = time.Second // after a failure; it doubles with each
	longRest  = time.Minute
	maxAnswer = 16 << 20
)

// get returns a case. It tries again what may pass: 429, 5xx, and no answer; but while the API is away the next round
// does that.
func (a *api) get(ctx context.Context, id string) (*state, error) {
	for attempt := 1; ; attempt++ {
		if err := sleep(ctx, time.Until(a.next)); err != nil {
			return nil, err
		}
		a.next = time.Now().Add(a.pause)
		c, rest, err := a.ask(ctx, id)
		if err == nil || rest < 0 {
			a.away = false
			return c, err
		}
		a.away = a.away || attempt == attempts
		if rest == 0 && !a.away {
			rest = min(firstRest<<(attempt-1), longRest)
			rest += rand.N(rest / 4) // so that many pollers do not come back at once
		}
		a.next = time.Now().Add(max(rest, a.pause))
		if a.away {
			return nil, err
		}
	}
}

// ask makes one request. With an error, rest says when to try again: never if negative, as usual if 0.
func (a *api) ask(ctx context.Context, id string) (c *state, rest time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.base+"/cases/"+url.PathEscape(id), nil)
	if err != nil {
		return nil, -1, err
	}
	req.Header.Set("x-api-key", a.key)
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, 0, err
	}
	var answer struct {
		OK    bool   `json:"ok"`
		Data  *state `json:"data"`
		Error struct {
			Code string `json:"code"`
		} `json:"error"`
	}
	err = json.Unmarshal(text, &answer)
	switch code := resp.StatusCode; {
	case code == http.StatusUnauthorized: // not 403, which may be about this case
		return nil, -1, fmt.Errorf("%w: %s", errKey, resp.Status)
	case code == http.StatusTooManyRequests || code >= 500:
		seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		rest = min(max(0, time.Duration(seconds)*time.Second), longRest)
		return nil, rest, fmt.Errorf("the API answers %s %s", resp.Status, answer.Error.Code)
	case code != http.StatusOK:
		return nil, -1, fmt.Errorf("the API answers %s %s", resp.Status, answer.Error.Code)
	case err != nil:
		return nil, -1, fmt.Errorf("the answer of the API: %w", err)
	case !answer.OK || answer.Data == nil:
		return nil, -1, fmt.Errorf("the API answers not ok: %s", answer.Error.Code)
	case answer.Data.CaseID != id:
		return nil, -1, errors.New("the API answers with another case")
	}
	return answer.Data, 0, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
