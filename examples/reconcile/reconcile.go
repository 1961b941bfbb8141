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
	"time"

	"offloadhook"
)

// reconciler delivers the events of cases as the API tells them.
type reconciler struct {
	api     *api
	deliver func(ctx context.Context, body []byte) (fresh bool, err error) // Receiver.Deliver
	minAge  time.Duration
	log     *slog.Logger
}

// tally says how many cases went which way.
type tally struct {
	repaired int // their event had not arrived
	known    int // their event had arrived
	young    int // updated less than minAge ago
	none     int // neither ended nor waiting for input
	failed   int
}

// run makes one round. A case that fails does not stop it; the end of ctx does, and so do a refused key and a receiver
// that is closed.
func (r *reconciler) run(ctx context.Context, ids []string) (t tally, err error) {
	for _, id := range ids {
		c, err := r.api.get(ctx, id)
		if ctx.Err() != nil || errors.Is(err, errKey) {
			return t, cmp.Or(ctx.Err(), err)
		}
		var body []byte
		if err == nil {
			body, err = event(c)
		}
		switch {
		case err != nil:
		case body == nil:
			t.none++
			continue
		case time.Since(c.UpdatedAt.Time()) < r.minAge:
			t.young++
			continue
		}
		fresh := false
		if err == nil {
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

// state is what GET /cases/{id} tells of a case. Its Metadata is always empty.
type state struct {
	offloadhook.Case
	UpdatedAt    offloadhook.Millis `json:"updatedAt"`
	Result       json.RawMessage    `json:"result"`
	InputRequest *struct {
		ID          string             `json:"id"`
		Question    string             `json:"question"`
		Status      string             `json:"status"`
		RequestedAt offloadhook.Millis `json:"requestedAt"`
	} `json:"inputRequest"`
}

// event returns the body of the webhook for the present state of c, nil if that is a state without one.
func event(c *state) (body []byte, err error) {
	var t offloadhook.EventType
	var payload any
	switch c.Status {
	case offloadhook.StatusCompleted:
		t = offloadhook.TypeCaseCompleted
		completed := offloadhook.CaseCompleted{Case: c.Case, Result: c.Result}
		if string(c.Result) == "null" {
			completed.Result = nil
		}
		payload = completed
	case offloadhook.StatusFailed:
		t = offloadhook.TypeCaseFailed
		payload = offloadhook.CaseFailed{Case: c.Case}
	case offloadhook.StatusInputNeeded:
		if c.InputRequest == nil {
			return nil, errors.New("it waits for input, but the API shows no inputRequest")
		}
		t = offloadhook.TypeCaseInputNeeded
		payload = offloadhook.CaseInputNeeded{
			Case:               c.Case,
			InputRequest:       c.InputRequest.Question,
			InputRequestID:     c.InputRequest.ID,
			InputRequestStatus: c.InputRequest.Status,
			InputRequestedAt:   c.InputRequest.RequestedAt,
		}
	default:
		return nil, nil
	}
	if c.UpdatedAt == 0 {
		return nil, errors.New("the API shows no updatedAt, so the event_id is unknown")
	}
	data, err := json.Marshal(payload)
	if err != nil {
		return nil, err
	}
	return json.Marshal(offloadhook.Envelope{
		EventID:   offloadhook.EventID(c.CaseID, t, c.UpdatedAt),
		EventType: t,
		Timestamp: c.UpdatedAt,
		Data:      data,
	})
}

// api asks Offload's API. It is not safe for concurrent use.
type api struct {
	base   string
	key    string
	client *http.Client
	pause  time.Duration // between two requests
	next   time.Time     // of the next request at the earliest
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
		pause: time.Duration(float64(time.Second) / rate),
	}
}

var errKey = errors.New("the API refuses the key")

const (
	attempts  = 6
	firstRest = time.Second // after a failure; it doubles with each
	longRest  = time.Minute
	maxAnswer = 16 << 20
)

// get returns a case. It tries again what may pass: 429, 5xx, and no answer.
func (a *api) get(ctx context.Context, id string) (*state, error) {
	for attempt := 1; ; attempt++ {
		if err := sleep(ctx, time.Until(a.next)); err != nil {
			return nil, err
		}
		a.next = time.Now().Add(a.pause)
		c, rest, err := a.ask(ctx, id)
		if err == nil || rest < 0 || attempt == attempts {
			return c, err
		}
		if rest == 0 {
			rest = min(firstRest<<(attempt-1), longRest)
			rest += rand.N(rest / 4) // so that many pollers do not come back at once
		}
		if err := sleep(ctx, rest); err != nil {
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
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
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
