package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	watermillhttp "github.com/ThreeDotsLabs/watermill-http/v2/pkg/http"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	cloudevents "github.com/cloudevents/sdk-go/v2"
	"github.com/cloudevents/sdk-go/v2/protocol"
	"github.com/go-chi/chi"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"offloadhook"
)

// receiver is a contestant: it takes requests and hands payloads to the callback.
type receiver struct {
	name  string
	lacks string // what it does not do
	dress func(e *event) error
	// start returns a handler, and what ends its work once every event has been handled.
	start func(dir string, handle func(*offloadhook.CaseCompleted)) (http.Handler, func() error, error)
}

const byHandName = "by hand"

var receivers = []receiver{
	{
		name:  "offloadhook, Memory",
		lacks: "keeps nothing over a crash",
		start: func(_ string, handle func(*offloadhook.CaseCompleted)) (http.Handler, func() error, error) {
			r := offloadhook.Handler(callbacks(handle))
			return r, func() error { return r.Shutdown(context.Background()) }, nil
		},
	},
	{
		name:  "offloadhook, Journal",
		lacks: "one process at a time; several replicas need a shared `Inbox`",
		start: func(dir string, handle func(*offloadhook.CaseCompleted)) (http.Handler, func() error, error) {
			journal, err := offloadhook.OpenJournal(dir, 0)
			if err != nil {
				return nil, nil, err
			}
			r := offloadhook.Handler(callbacks(handle), offloadhook.WithInbox(journal))
			return r, func() error { return errors.Join(r.Shutdown(context.Background()), journal.Close()) }, nil
		},
	},
	{
		name:  byHandName,
		lacks: "keeps nothing over a crash; no retry, no order; goroutines, bodies and ids without a bound",
		start: func(_ string, handle func(*offloadhook.CaseCompleted)) (http.Handler, func() error, error) {
			var h handmade
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				body, err := io.ReadAll(req.Body)
				if err != nil {
					w.WriteHeader(http.StatusBadRequest)
					return
				}
				w.WriteHeader(h.take(body, handle))
			}), h.drain, nil
		},
	},
	{
		name: "watermill-http with Deduplicator",
		lacks: "answers when the callback has returned, so a slow one holds the sender; keeps nothing over a crash, " +
			"nor an id whose callback failed from being dropped as a duplicate; no order; envelope and payload by hand",
		start: startWatermill,
	},
	{
		name: "CloudEvents SDK",
		lacks: "cannot read what Offload sends (here the same data, sent as CloudEvents); " +
			"no dedupe, queue or retry: those of *by hand* are added here",
		dress: asCloudEvent,
		start: startCloudEvents,
	},
	{
		name: "standard-webhooks",
		lacks: "checks a signature, which Offload does not send (here it does), and nothing else: " +
			"the rest is *by hand*",
		dress: sign,
		start: startStandardWebhooks,
	},
	{
		name:  "bare floor",
		lacks: "anything: reads the body and answers",
		start: func(string, func(*offloadhook.CaseCompleted)) (http.Handler, func() error, error) {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if _, err := io.Copy(io.Discard, req.Body); err != nil {
					w.WriteHeader(http.StatusBadRequest)
					return
				}
				w.WriteHeader(http.StatusAccepted)
			}), nil, nil
		},
	},
}

func callbacks(handle func(*offloadhook.CaseCompleted)) offloadhook.Callbacks {
	return offloadhook.Callbacks{
		CaseCompleted: func(_ context.Context, _ *offloadhook.Envelope, c *offloadhook.CaseCompleted) error {
			handle(c)
			return nil
		},
	}
}

// handmade is what one writes in an afternoon.
type handmade struct {
	seen    sync.Map
	running sync.WaitGroup
}

// take returns the status of the answer.
func (h *handmade) take(body []byte, handle func(*offloadhook.CaseCompleted)) (status int) {
	var env offloadhook.Envelope
	if err := json.Unmarshal(body, &env); err != nil {
		return http.StatusBadRequest
	}
	var payload offloadhook.CaseCompleted
	if err := json.Unmarshal(env.Data, &payload); err != nil {
		return http.StatusBadRequest
	}
	return h.run(env.EventID, &payload, handle)
}

func (h *handmade) run(
	id string, payload *offloadhook.CaseCompleted, handle func(*offloadhook.CaseCompleted),
) (status int) {
	if _, known := h.seen.LoadOrStore(id, struct{}{}); known {
		return http.StatusOK
	}
	h.running.Go(func() { handle(payload) })
	return http.StatusAccepted
}

func (h *handmade) drain() error {
	h.running.Wait()
	return nil
}

// startWatermill subscribes to the requests. The Deduplicator is told the event_id, because the checksum of the body
// that it takes by default, Adler-32, is soon the same for two different events.
func startWatermill(_ string, handle func(*offloadhook.CaseCompleted)) (http.Handler, func() error, error) {
	mux := chi.NewRouter()
	subscriber, err := watermillhttp.NewSubscriber("127.0.0.1:0", watermillhttp.SubscriberConfig{
		Router: mux,
		UnmarshalMessageFunc: func(_ string, req *http.Request) (*message.Message, error) {
			body, err := io.ReadAll(req.Body)
			if err != nil {
				return nil, err
			}
			var env offloadhook.Envelope
			if err := json.Unmarshal(body, &env); err != nil {
				return nil, err
			}
			msg := message.NewMessage(env.EventID, message.Payload(env.Data))
			msg.Metadata.Set("event_id", env.EventID)
			return msg, nil
		},
	}, nil)
	if err != nil {
		return nil, nil, err
	}
	ids, err := middleware.NewMapExpiringKeyRepository(24 * time.Hour)
	if err != nil {
		return nil, nil, err
	}
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	if err != nil {
		return nil, nil, err
	}
	router.AddMiddleware((&middleware.Deduplicator{
		KeyFactory: middleware.NewMessageHasherFromMetadataField("event_id"), Repository: ids, Timeout: time.Second,
	}).Middleware)
	router.AddConsumerHandler("offload", "/offload", subscriber, func(msg *message.Message) error {
		var payload offloadhook.CaseCompleted
		if err := json.Unmarshal(msg.Payload, &payload); err != nil {
			return err
		}
		handle(&payload)
		return nil
	})
	ended := make(chan error, 1)
	go func() { ended <- router.Run(context.Background()) }()
	select {
	case <-router.Running():
	case err := <-ended:
		return nil, nil, fmt.Errorf("watermill: %w", err)
	}
	return mux, func() error { return errors.Join(router.Close(), <-ended) }, nil
}

// asCloudEvent makes a CloudEvent of e in binary mode, which is the SDK's faster one.
func asCloudEvent(e *event) error {
	env, err := offloadhook.ParseEnvelope(e.body)
	if err != nil {
		return err
	}
	for name, value := range map[string]string{
		"ce-specversion": "1.0", "ce-id": env.EventID, "ce-type": string(env.EventType), "ce-source": "/offload",
		"ce-time": env.Timestamp.Time().Format(time.RFC3339),
	} {
		e.header.Set(name, value)
	}
	e.body = env.Data
	return nil
}

func startCloudEvents(_ string, handle func(*offloadhook.CaseCompleted)) (http.Handler, func() error, error) {
	receiver, err := cloudevents.NewHTTP()
	if err != nil {
		return nil, nil, err
	}
	// The client would open a listener of its own, so it is shown only the part that hands over what came in.
	// NewHTTPReceiveHandler is no choice: when requests overlap, it can leave the last one without an answer.
	client, err := cloudevents.NewClient(struct {
		protocol.Receiver
		protocol.Responder
	}{receiver, receiver})
	if err != nil {
		return nil, nil, err
	}
	var h handmade
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- client.StartReceiver(ctx, func(e cloudevents.Event) cloudevents.Result {
			var payload offloadhook.CaseCompleted
			if err := e.DataAs(&payload); err != nil {
				return cloudevents.NewHTTPResult(http.StatusBadRequest, "data does not fit")
			}
			h.run(e.ID(), &payload, handle)
			return nil
		})
	}()
	return receiver, func() error {
		cancel()
		return errors.Join(<-ended, h.drain())
	}, nil
}

// webhook has the key of the sender and of the receiver.
var webhook = func() *standardwebhooks.Webhook {
	w, err := standardwebhooks.NewWebhook(base64.StdEncoding.EncodeToString([]byte("twenty-four bytes or so.")))
	if err != nil {
		panic(err)
	}
	return w
}()

func sign(e *event) error {
	now := time.Now()
	signature, err := webhook.Sign(e.id, now, e.body)
	e.header.Set(standardwebhooks.HeaderWebhookID, e.id)
	e.header.Set(standardwebhooks.HeaderWebhookTimestamp, strconv.FormatInt(now.Unix(), 10))
	e.header.Set(standardwebhooks.HeaderWebhookSignature, signature)
	return err
}

func startStandardWebhooks(_ string, handle func(*offloadhook.CaseCompleted)) (http.Handler, func() error, error) {
	var h handmade
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		if err := webhook.Verify(body, req.Header); err != nil {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.WriteHeader(h.take(body, handle))
	}), h.drain, nil
}

// round is what a receiver did in one.
type round struct {
	perSecond float64
	allocs    float64 // per request
}

// runReceiver sends requests to c until the last one is handled and c has come to rest.
func (b *bench) runReceiver(c receiver, network bool) (r round, err error) {
	events, err := newEvents(b.requests, c.dress)
	if err != nil {
		return r, err
	}
	t := newTally(len(events))
	handler, drain, err := c.start(b.folder(), t.handle)
	if err != nil {
		return r, err
	}
	send := newInProcess(handler, b.clients).send
	if network {
		l, err := newLoopback(handler, b.clients)
		if err != nil {
			return r, err
		}
		defer l.close()
		send = l.send
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	start := time.Now()
	err = sendAll(events, b.clients, send)
	if drain != nil {
		if err == nil {
			err = t.wait()
		}
		err = errors.Join(err, drain(), t.check())
	}
	r.perSecond = float64(len(events)) / time.Since(start).Seconds()
	runtime.ReadMemStats(&after)
	r.allocs = float64(after.Mallocs-before.Mallocs) / float64(len(events))
	return r, err
}

// receiverResult is what a receiver did in all rounds.
type receiverResult struct {
	receiver
	loopback, inProcess, allocs []float64
}

func (b *bench) compareReceivers() ([]receiverResult, error) {
	results := make([]receiverResult, len(receivers))
	for n := range b.rounds {
		if err := b.begin("receivers: round %d of %d", n+1, b.rounds); err != nil {
			return nil, err
		}
		for _, network := range []bool{true, false} {
			for _, i := range turns(len(receivers), n) {
				r, err := b.runReceiver(receivers[i], network)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", receivers[i].name, err)
				}
				results[i].receiver = receivers[i]
				if network {
					results[i].loopback = append(results[i].loopback, r.perSecond)
				} else {
					results[i].inProcess = append(results[i].inProcess, r.perSecond)
					results[i].allocs = append(results[i].allocs, r.allocs)
				}
			}
		}
	}
	return results, nil
}

func (b *bench) printReceivers(results []receiverResult) {
	base := results[0]
	for _, r := range results {
		if r.name == byHandName {
			base = r
		}
	}
	fmt.Fprintf(b.out, "Events taken and handled, %d clients, as a multiple of *by hand*: "+
		"the median of %d rounds of %s.\n\n",
		b.clients, b.rounds, thousands(float64(b.requests)))
	b.header("receiver", "over HTTP", "requests/s", "in process", "allocations", "does not do ")
	for _, r := range results {
		b.row(r.name,
			fmt.Sprintf("%.2f", medianRatio(r.loopback, base.loopback)), thousands(median(r.loopback)),
			fmt.Sprintf("%.2f", medianRatio(r.inProcess, base.inProcess)), fmt.Sprintf("%.0f", median(r.allocs)),
			r.lacks)
	}
}
