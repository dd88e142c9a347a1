package integration

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/test/cluster/cluster"
)

// tries returns how many writes of target Secrets a duty tried in a namespace since mark,
// whatever was answered.
func (s *system) tries(mark cluster.Mark, agent, namespace string) int {
	s.t.Helper()
	tries := 0
	for _, e := range s.requests(mark, agent) {
		if e.Resource == "secrets" && e.Namespace == namespace && (e.Verb == "patch" || e.Verb == "delete") {
			tries++
		}
	}
	return tries
}

// refusal is one way of the API server to refuse a write in one namespace.
type refusal struct {
	// begin has the writes of Secrets refused in namespaces with this label, and returns
	// what ends it.
	begin func(s *system, namespace, label string) (end func())
	says  string
}

// What is refused is told, tried ever more seldom, and holds up nobody else. It is tried
// again with the next change, and then delivered.
func TestWhatTheAPIServerRefusesIsToldAndNotTriedAgainAndAgain(t *testing.T) {
	for name, refusal := range map[string]refusal{
		"for the namespace's quota": {
			func(s *system, namespace, _ string) func() {
				s.quota(namespace, "0")
				return func() {
					require.NoError(s.t, s.core.CoreV1().ResourceQuotas(namespace).Delete(s.t.Context(), "few", metav1.DeleteOptions{}))
				}
			},
			"the namespace's quota is exceeded",
		},
		"by a ValidatingAdmissionPolicy": {denyByPolicy, "no pull Secrets here, says the policy"},
		"by a webhook": {
			func(s *system, namespace, label string) func() {
				webhook := s.webhook(namespace, label)
				return func() { webhook.allow() }
			},
			"no pull Secrets here, says the webhook",
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.patience = patient
			s.source("hub", dockerConfig("registry.one"))
			s.coordinator()
			s.agent("node-a")
			refused, free := s.namespace(map[string]string{s.prefix: "refused"}, nil), s.namespace(nil, nil)
			end := refusal.begin(s, refused, "refused")
			mark, began := s.control.Audit().Mark(), time.Now()
			// Without a change, tries are one second apart, then two, four, and so on.
			most := func(changes int) int { return changes + int(math.Log2(1+time.Since(began).Seconds())) }
			s.resource(s.prefix, spec(`  namespaces: {names: [`+refused+`, `+free+`]}`))
			s.has(free, "registry.one")
			s.failed(s.prefix, refused, refusal.says)
			told := time.Now()
			s.pod(refused, "node-a", nil, nil)
			s.eventually(func() error {
				if s.tries(mark, "agent/node-a", refused) == 0 {
					return fmt.Errorf("no try")
				}
				return nil
			}, "the agent does not try")

			s.eventually(func() error {
				if time.Since(told) < 2*time.Second {
					return fmt.Errorf("two seconds are not over")
				}
				return nil
			}, "time stands still")
			require.LessOrEqual(t, s.tries(mark, "coordinator", refused), most(1))
			change := s.control.Audit().Mark()
			s.source("hub", dockerConfig("registry.two"))
			s.has(free, "registry.two")
			s.eventually(func() error {
				if s.tries(change, "coordinator", refused) == 0 {
					return fmt.Errorf("no try")
				}
				return nil
			}, "a change is no reason to try again")
			s.failed(s.prefix, refused, refusal.says)
			require.LessOrEqual(t, s.tries(mark, "coordinator", refused), most(2))
			require.LessOrEqual(t, s.tries(mark, "agent/node-a", refused), most(1))
			require.Nil(t, s.secret(refused, secretName))

			end()
			s.eventually(func() error { // a cache of the API server may still refuse
				s.annotate(refused, map[string]string{"looked-at": cluster.Prefix(t)})
				if s.secret(refused, secretName) == nil {
					return fmt.Errorf("no Secret")
				}
				return nil
			}, "it is not delivered")
			s.has(refused, "registry.two")
			s.ready(s.prefix, 2)
			require.Len(t, append(s.secretWrites(mark, "agent/node-a"), s.secretWrites(mark, "coordinator")...), 3, "one change, two new")
		})
	}
}

func denyByPolicy(s *system, namespace, label string) (end func()) {
	s.t.Helper()
	policies, bindings := s.core.AdmissionregistrationV1().ValidatingAdmissionPolicies(), s.core.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings()
	meta := metav1.ObjectMeta{Name: s.prefix}
	_, err := policies.Create(s.t.Context(), &admissionregistrationv1.ValidatingAdmissionPolicy{
		ObjectMeta: meta,
		Spec: admissionregistrationv1.ValidatingAdmissionPolicySpec{
			MatchConstraints: &admissionregistrationv1.MatchResources{
				NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{s.prefix: label}},
				ResourceRules: []admissionregistrationv1.NamedRuleWithOperations{{
					RuleWithOperations: admissionregistrationv1.RuleWithOperations{
						Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create, admissionregistrationv1.Update},
						Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"secrets"}},
					},
				}},
			},
			Validations: []admissionregistrationv1.Validation{{Expression: "false", Message: "no pull Secrets here, says the policy"}},
		},
	}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	_, err = bindings.Create(s.t.Context(), &admissionregistrationv1.ValidatingAdmissionPolicyBinding{
		ObjectMeta: meta,
		Spec: admissionregistrationv1.ValidatingAdmissionPolicyBindingSpec{
			PolicyName: s.prefix, ValidationActions: []admissionregistrationv1.ValidationAction{admissionregistrationv1.Deny},
		},
	}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = policies.Delete(ctxOf(s.t), s.prefix, metav1.DeleteOptions{}) })
	s.refuses(namespace, "says the policy")
	return func() { require.NoError(s.t, bindings.Delete(s.t.Context(), s.prefix, metav1.DeleteOptions{})) }
}

// refuses waits until the API server refuses Secrets in a namespace with this text.
func (s *system) refuses(namespace, text string) {
	s.t.Helper()
	s.eventually(func() error {
		_, err := s.core.CoreV1().Secrets(namespace).Create(s.t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "probe"}},
			metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil {
			return fmt.Errorf("it is accepted")
		}
		require.ErrorContains(s.t, err, text)
		return nil
	}, "the API server does not refuse")
}

// webhook is an admission webhook for the Secrets of one test.
type webhook struct {
	// mode is what it does.
	mode atomic.Int32
}

const (
	denying int32 = iota
	down
	hanging
	allowing
)

func (w *webhook) allow() { w.mode.Store(allowing) }

// webhook registers a webhook that denies, and waits until it is asked.
func (s *system) webhook(namespace, label string) *webhook {
	s.t.Helper()
	w := &webhook{}
	server := httptest.NewTLSServer(w)
	s.t.Cleanup(server.Close)
	configurations := s.core.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	fail, none, seconds := admissionregistrationv1.Fail, admissionregistrationv1.SideEffectClassNone, int32(5)
	_, err := configurations.Create(s.t.Context(), &admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: s.prefix},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{
			Name: "secrets.imps.example", FailurePolicy: &fail, SideEffects: &none, TimeoutSeconds: &seconds, AdmissionReviewVersions: []string{"v1"},
			ClientConfig: admissionregistrationv1.WebhookClientConfig{
				URL:      &server.URL,
				CABundle: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}),
			},
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{s.prefix: label}},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{
					admissionregistrationv1.Create, admissionregistrationv1.Update, admissionregistrationv1.Delete,
				},
				Rule: admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"secrets"}},
			}},
		}},
	}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, configurations.Delete(ctxOf(s.t), s.prefix, metav1.DeleteOptions{})) })
	s.refuses(namespace, "says the webhook")
	return w
}

// ServeHTTP implements http.Handler.
func (w *webhook) ServeHTTP(answer http.ResponseWriter, r *http.Request) {
	var review admissionv1.AdmissionReview
	mode := w.mode.Load()
	err := json.NewDecoder(r.Body).Decode(&review)
	if mode == hanging {
		<-r.Context().Done() // when the API server has waited long enough
	}
	if err != nil || mode == down || mode == hanging {
		panic(http.ErrAbortHandler)
	}
	review.Response = &admissionv1.AdmissionResponse{UID: review.Request.UID, Allowed: mode == allowing}
	if !review.Response.Allowed {
		review.Response.Result = &metav1.Status{Message: "no pull Secrets here, says the webhook"}
	}
	review.Request = nil
	answer.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(answer).Encode(review)
}

// What is there stays as it is while its changes are refused, and goes with the next look
// when its deletion is not refused any more.
func TestARefusedChangeAndARefusedDeletionAreToldAndMadeInTheEnd(t *testing.T) {
	s := newSystem(t)
	s.patience = patient
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	refused, free := s.namespace(map[string]string{s.prefix: "refused"}, nil), s.namespace(nil, nil)
	s.resource(s.prefix, spec(`  namespaces: {names: [`+free+`], labels: [{matchLabels: {`+s.prefix+`: refused}}]}`))
	was := s.has(refused, "registry.one")
	s.ready(s.prefix, 2)
	webhook := s.webhook(refused, "refused")
	mark, began := s.control.Audit().Mark(), time.Now()
	most := func(changes int) int { return changes + int(math.Log2(1+time.Since(began).Seconds())) }

	s.source("hub", dockerConfig("registry.two"))
	s.has(free, "registry.two")
	s.failed(s.prefix, refused, "says the webhook")
	require.Equal(t, was.ResourceVersion, s.secret(refused, secretName).ResourceVersion)
	// The label by which the webhook knows the namespace stays.
	s.change(s.prefix, `spec: {target: {namespaces: {labels: []}}}`)
	s.failed(s.prefix, "could not be deleted", refused, "says the webhook")
	require.Equal(t, was.ResourceVersion, s.secret(refused, secretName).ResourceVersion)
	require.LessOrEqual(t, s.tries(mark, "coordinator", refused), most(2))
	require.Empty(t, s.event(s.prefix, corev1.EventTypeWarning, "SecretDeletionError", refused))

	webhook.allow()
	s.annotate(refused, map[string]string{"looked-at": "again"}) // else it would be ten minutes
	s.lacks(refused)
	s.ready(s.prefix, 1)
	s.calm()
	require.Len(t, s.secretWrites(mark, "coordinator"), 2, "one changed, one deleted")
}

// A webhook that does not answer is not a refusal: it is tried, ever more seldom, until it
// does, without any change.
func TestAWebhookThatDoesNotAnswerDelaysOnlyItsNamespaces(t *testing.T) {
	for name, mode := range map[string]int32{"it hangs up": down, "it hangs": hanging} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.patience = patient
			s.source("hub", dockerConfig("registry.one"))
			behind, free := s.namespace(map[string]string{s.prefix: "behind"}, nil), s.namespace(nil, nil)
			webhook := s.webhook(behind, "behind")
			webhook.mode.Store(mode)
			s.coordinator()
			mark, began := s.control.Audit().Mark(), time.Now()
			s.resource(s.prefix, spec(`  namespaces: {names: [`+behind+`, `+free+`]}`))
			s.has(free, "registry.one")
			s.failed(s.prefix, behind, "will be tried again", "failed calling webhook")
			s.eventually(func() error {
				if n := s.tries(mark, "coordinator", behind); n < 3 {
					return fmt.Errorf("%d tries", n)
				}
				return nil
			}, "it is not tried again")
			// A tenth of a second apart at first, then two, four, and so on.
			require.LessOrEqual(t, s.tries(mark, "coordinator", behind), 2+int(math.Log2(1+10*time.Since(began).Seconds())))
			webhook.allow()
			s.has(behind, "registry.one")
			s.ready(s.prefix, 2)
			s.calm()
			require.Len(t, s.secretWrites(mark, "coordinator"), 2)
		})
	}
}

// A Secret of imps's own that a user made immutable cannot be changed in place, and is not
// replaced either.
func TestASecretThatWasMadeImmutableStaysAndSaysSo(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	frozen, free := s.namespace(nil, nil), s.namespace(nil, nil)
	s.resource(s.prefix, spec(`  namespaces: {names: [`+frozen+`, `+free+`]}`))
	s.has(frozen, "registry.one")
	s.ready(s.prefix, 2)
	was, err := s.core.CoreV1().Secrets(frozen).Patch(t.Context(), secretName, types.MergePatchType, []byte(`{"immutable":true}`), metav1.PatchOptions{FieldManager: "a-user"})
	require.NoError(t, err)
	mark := s.control.Audit().Mark()
	s.source("hub", dockerConfig("registry.two"))
	s.has(free, "registry.two")
	s.failed(s.prefix, frozen, "data")
	s.manages(s.prefix, frozen, free)
	require.Equal(t, was.ResourceVersion, s.secret(frozen, secretName).ResourceVersion)
	require.Equal(t, 1, s.tries(mark, "coordinator", frozen))

	require.NoError(t, s.core.CoreV1().Secrets(frozen).Delete(t.Context(), secretName, metav1.DeleteOptions{}))
	s.has(frozen, "registry.two")
	s.ready(s.prefix, 2)
	s.calm()
}

// A namespace that begins to terminate takes its Secret with it: nobody tries to put it
// back, and no status complains.
func TestANamespaceThatTerminatesIsLeftAlone(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	going, staying := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	s.pod(going, "node-a", map[string]string{s.prefix: "a"}, nil)
	s.has(going, "registry.one")
	s.ready(s.prefix, 2)
	held := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "holds", Namespace: going, Finalizers: []string{"test/holds"}}}
	_, err := s.core.CoreV1().ConfigMaps(going).Create(t.Context(), held, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := s.core.CoreV1().ConfigMaps(going).Patch(ctxOf(t), "holds", types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
		require.NoError(t, err)
	})
	mark := s.control.Audit().Mark()
	require.NoError(t, s.core.CoreV1().Namespaces().Delete(t.Context(), going, metav1.DeleteOptions{}))
	s.lacks(going)
	s.ready(s.prefix, 1)
	s.source("hub", dockerConfig("registry.two"))
	s.has(staying, "registry.two")
	s.ready(s.prefix, 1)
	require.Nil(t, s.secret(going, secretName))
	require.LessOrEqual(t, s.tries(mark, "coordinator", going)+s.tries(mark, "agent/node-a", going), 1, "at most one that met its end")
	s.calm()
}
